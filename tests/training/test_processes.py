"""The Trainer: a batch in parts, or over several processes, gives the step of the whole batch."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from toy_training import (
    TINY,
    Call,
    Drawing,
    assert_close,
    convnet,
    copy_of,
    memory_loader,
    same,
    small_net,
    toy_batches,
    train_quietly,
    vit_with_sincos,
    without_times,
)

from train_vit import Stopped, Trainer
from vit_bridge.models.beit import MaskedTokenModel
from vit_bridge.models.deit import DistilledViT
from vit_bridge.models.mae import MaskedAutoencoder
from vit_bridge.preprocessing import Preprocessing
from vit_bridge.training.objectives import Classification, CrossEntropy, Distillation, MaskedPixels, MaskedTokens
from vit_bridge.training.tokenizer import PatchTokenizer
from vit_model import DropPath, VisionTransformer

# ---- In parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_weights", [None, (0.25, 1, 3)])
@pytest.mark.parametrize("grad_accum_steps", [2, 3, 7, 11])
def test_trainer_step_is_the_same_for_a_split_batch(grad_accum_steps, class_weights):
    results = []
    for n_parts in (1, grad_accum_steps):
        torch.manual_seed(0)
        trainer = Trainer(small_net(), "cpu", loss_fn=CrossEntropy(0.1, class_weights), clip_norm=0.1,
                          grad_accum_steps=n_parts)
        history = train_quietly(trainer, toy_batches(4, 7), n_epochs=1, learning_rate=1e-3)
        results.append((copy_of(trainer.model), history))
    assert_close(results[1][0], results[0][0], 1e-6)
    assert results[1][1]["train_loss"] == pytest.approx(results[0][1]["train_loss"], abs=1e-6)
    assert results[1][1]["train_acc"] == results[0][1]["train_acc"]


def test_trainer_feeds_the_model_a_batch_in_parts():
    sizes = []
    model = small_net()
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    train_quietly(Trainer(model, "cpu", grad_accum_steps=3), toy_batches(2, 7), n_epochs=1)
    assert sizes == [3, 3, 1] * 2


def test_batch_split_warning_names_what_differs():
    plain = dict(device="cpu", amp="off")
    with_path = nn.Sequential(small_net(), DropPath(0.1))
    with_dropout = nn.Sequential(small_net(), nn.Dropout(0.1))
    for model in (VisionTransformer(**TINY), convnet(), with_path, with_dropout):
        assert Trainer(model, **plain).batch_split_warning() == ""
    assert Trainer(VisionTransformer(**TINY), "cpu", amp="bf16").batch_split_warning() == ""
    assert Trainer(VisionTransformer(**TINY), **plain, grad_accum_steps=2).batch_split_warning() == ""
    for model, word in ((convnet(), "batch normalisation"), (with_path, "dropout"), (with_dropout, "dropout")):
        text = Trainer(model, **plain, grad_accum_steps=3).batch_split_warning()
        assert word in text
        assert "in 3 parts" in text
        assert ";" not in text  # one reason
    mixed = dict(plain, objective=Classification(mixing=max))
    assert "mixed within each part" in Trainer(VisionTransformer(**TINY), **mixed,
                                               grad_accum_steps=2).batch_split_warning()
    assert Trainer(VisionTransformer(**TINY), **mixed).batch_split_warning() == ""
    assert "bfloat16" in Trainer(VisionTransformer(**TINY), "cpu", amp="bf16", grad_accum_steps=2).batch_split_warning()


def test_batch_split_warning_names_the_masks_where_they_differ():
    """Processes draw different masks. The parts of one process draw the same ones on the CPU, but MAE's on a GPU."""
    tokenizer = PatchTokenizer(5, 2).fit(torch.randn(5, 3, 8, 8))
    vit = dict(img_size=8, patch_size=2, embed_dim=12, depth=1, n_heads=3)
    mae = MaskedAutoencoder(**vit, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    beit = MaskedTokenModel(**vit, n_tokens=5)
    for model, objective, n_warnings in ((mae, MaskedPixels(), 3), (beit, MaskedTokens(tokenizer), 2)):
        trainer, texts = Trainer(model, "cpu", objective, amp="off", grad_accum_steps=2), []
        for device, world_size in (("cpu", 1), ("cuda", 1), ("cpu", 2), ("cuda", 2)):
            trainer.device, trainer.world_size = torch.device(device), world_size
            texts.append(trainer.batch_split_warning())
        told = [text for text in texts if text]
        assert told == texts[-n_warnings:]
        assert all(text.endswith("batches: the hidden patches are drawn separately for each part") for text in told)


# ---- Several processes ------------------------------------------------------------------------------------


SIZES = (7, 3, 1)  # the second of two processes gets no image of the last batch


RUNS = {  # model, loaders for training and validation, arguments of Trainer, arguments of train()
    "list": (small_net, lambda: (sized_batches(SIZES), sized_batches((5, 1))),
             dict(grad_accum_steps=2, loss_fn=CrossEntropy(0.1, [0.5, 1, 2])), dict(ema_decay=0.9)),
    "memory": (small_net, lambda: (memory_loader(17, 5, training=True), memory_loader(11, 5)), {}, {}),
    "one image": (small_net, lambda: (memory_loader(17, 5, training=True), sized_batches((1,))), {}, {}),
    "one in memory": (small_net, lambda: (sized_batches((5,)), memory_loader(1, 5)), {}, {}),
    "taught": (lambda: DistilledViT(**TINY, position="sincos"), lambda: (sized_batches(SIZES), memory_loader(11, 5)),
               lambda: dict(clip_norm=0.1, objective=taught()), {}),
    "vit": (vit_with_sincos, lambda: (sized_batches(SIZES), memory_loader(11, 5)), dict(clip_norm=0.1), {})}


def sized_batches(sizes):
    return [(images[:size], labels[:size]) for (images, labels), size in zip(toy_batches(len(sizes)), sizes,
                                                                             strict=True)]


def taught():
    """Return a Distillation whose teacher is the same in all processes."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        teacher = convnet()
    teacher.preprocessing = Preprocessing(8, (0.5,) * 3, (0.25,) * 3, class_names=["a", "b", "c"])
    return Distillation(teacher, teacher.preprocessing, "soft", 0.5)


def run_of(name):
    """Return the history, weights and average of one of RUNS, by this process alone or with the others."""
    make, loaders, settings, arguments = RUNS[name]
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # only the first process's weights count
    trainer = Trainer(make(), "cpu", amp="off", **settings() if callable(settings) else settings)
    history = train_quietly(trainer, *loaders(), n_epochs=2, **arguments)
    return dict(history=history, weights=copy_of(trainer.model), average=trainer.average and copy_of(trainer.average))


def stopped_run(stop_rank, n, resume=None):
    """Run "list" until one rank stops it, or resume it to its end."""
    make, loaders, settings, arguments = RUNS["list"]
    torch.manual_seed(dist.get_rank())
    trainer = Trainer(make(), "cpu", amp="off", **settings)
    call = Call(n if dist.get_rank() == stop_rank else None)
    try:
        history = train_quietly(trainer, *loaders(), n_epochs=2, resume=resume, **arguments,
                                on_batch=call if resume is None else None)
    except Stopped as stop:
        return dict(step=stop.state.step, count=call.count, saved=stop.state.state_dict())
    return dict(history=history, weights=copy_of(trainer.model), average=copy_of(trainer.average))


def work_of_a_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))  # an error instead of an endless wait for the other process
    results = {name: run_of(name) for name in RUNS}
    for name, n in (("stop", 8), ("stop in evaluation", 5)):  # an epoch has 3 + 1 + 2 calls
        results[name] = [stopped_run(1, n)]
        torch.save(results[name][0]["saved"], f"{folder}/{name} {rank}.pt")
        dist.barrier()
        results[name].append(stopped_run(1, n, torch.load(f"{folder}/{name} 0.pt", weights_only=True)))
    torch.manual_seed(rank)
    trainer = Trainer(convnet(), "cpu", amp="off")
    history = train_quietly(trainer, toy_batches(2, 7), toy_batches(1, 5), n_epochs=2)
    results["batchnorm"] = dict(history=history, text=trainer.batch_split_warning(), weights=copy_of(trainer.model))
    torch.manual_seed(rank)
    drawing = Drawing()
    train_quietly(Trainer(drawing, "cpu"), toy_batches(2, 7), n_epochs=1)
    results["drawn"] = drawing.drawn
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_trainer_on_two_processes_matches_one(tmp_path):
    torch.multiprocessing.spawn(work_of_a_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, (_, _, _, arguments) in RUNS.items():
        alone, one, two = run_of(name), first[name], second[name]
        assert same(one["weights"], two["weights"]), name
        for column in ("train_loss", "val_loss"):
            assert one["history"][column] == pytest.approx(alone["history"][column], abs=1e-4), (name, column)
            assert one["history"][column] == pytest.approx(two["history"][column]), (name, column)
        for column in ("train_acc", "val_acc", "val_balanced_acc", "lr"):
            assert one["history"][column] == two["history"][column], (name, column)
            assert one["history"][column] == pytest.approx(alone["history"][column]), (name, column)
        counts, others = ([s * v for s, v in zip(run["history"]["seconds"], run["history"]["images_per_second"],
                                                 strict=True)] for run in (one, alone))
        assert counts == pytest.approx(others), name
        if name not in ("vit", "taught"):  # in which Adam turns rounding errors into whole steps
            assert_close(one["weights"], alone["weights"], 1e-4)
        if arguments:
            assert same(one["average"], two["average"])
            assert_close(one["average"], alone["average"], 1e-4)
    for name, step in (("stop", 5), ("stop in evaluation", 3)):
        (stopped, rest), (other, _) = first[name], second[name]
        assert stopped["step"] == other["step"] == step
        assert stopped["count"] == other["count"]
        assert same(rest["weights"], first["list"]["weights"])
        assert same(rest["average"], first["list"]["average"])
        for column, values in without_times(rest["history"]).items():
            assert values == pytest.approx(first["list"]["history"][column]), (name, column)
    assert without_times(first["batchnorm"]["history"]) == without_times(second["batchnorm"]["history"])
    alone = Trainer(convnet(), "cpu", amp="off")  # with the first process's batch normalisation statistics
    alone.model.load_state_dict(first["batchnorm"]["weights"])
    assert first["batchnorm"]["history"]["val_loss"][-1] == pytest.approx(alone.evaluate(toy_batches(1, 5))["loss"])
    assert "2 processes" in first["batchnorm"]["text"]
    assert "batch normalisation" in first["batchnorm"]["text"]
    assert not set(first["drawn"]) & set(second["drawn"])
