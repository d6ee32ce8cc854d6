"""benchmarks/trust.py: areas are means over the images that have a map; the command names the options."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from figure_checks import SIZE, vit

from vit_bridge.analysis.explanations import area_under, compare_explanations
from vit_model import InputError


@pytest.fixture(scope="module")
def trust():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("trust", Path(__file__).parents[2] / "benchmarks" / "trust.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def model_and_images():
    model = vit()
    torch.manual_seed(0)  # after the model, whose initialisation draws different numbers in different versions of torch
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape))
    return model, torch.randn(7, 3, *SIZE, generator=torch.Generator().manual_seed(3))


def test_areas_are_means_over_the_images_that_have_a_map(trust):
    model, images = model_and_images()
    whole = compare_explanations(model, images, seed=5, n_steps=3, n_draws=2)
    assert whole.blank == {"grad_cam": 1}
    result = trust.areas(model, images, seed=5, chunk=5, n_steps=3, n_draws=2)
    assert result["blank"] == {"attention": 0, "rollout": 0, "relevance": 0, **whole.blank}
    for what in ("deletion", "insertion"):
        for name, curves in getattr(whole, what).items():
            drawn = [area for area in area_under(curves).tolist() if area == area]  # without NaN
            assert result[what][name] == pytest.approx(sum(drawn) / len(drawn), abs=1e-6)
        draws = area_under(whole.draws[what].transpose(0, 1))  # (R, B)
        assert result["draws"][what] == pytest.approx(draws.mean(dim=1).tolist(), abs=1e-6)
        for name, lead in whole.leads[what].items():
            assert result["leads"][what][name] == pytest.approx(lead, abs=1e-6)
        assert sum(result["draws"][what]) / 2 == pytest.approx(result[what]["random order"], abs=1e-6)
    torch.testing.assert_close(torch.tensor(result["correlations"]["values"]), whole.correlations.float())


def test_areas_refuses_a_method_blank_for_every_image(trust):
    model, images = model_and_images()
    with torch.no_grad():
        model.head.weight.zero_()
    with pytest.raises(InputError, match="no map for any of 5 images: Grad-CAM is blank"):
        trust.areas(model, images, seed=0, chunk=5, n_steps=2, n_draws=1)


def test_command_of_names_only_options_that_differ(trust):
    assert trust.command_of(1, 2000, 500) == "python benchmarks/trust.py --keep --seeds 1"
    assert trust.command_of(0, 30, 40) == "python benchmarks/trust.py --keep --seeds 0 --steps 30 --n-images 40"
