"""Command lines: wrong input ends in one line, signals stop at a safe point, no folder is overwritten."""

import argparse
import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image

import visualizations
from vit_bridge.analysis.metrics import percent
from vit_bridge.cli import OneLineParser, counted, int_at_least, positive, script, seed
from vit_bridge.errors import Assumption, assume
from vit_bridge.plots.explorer import ExplorerPage
from vit_bridge.preprocessing import Preprocessing, Whole
from vit_bridge.runtime import processes
from vit_bridge.system import (
    Interrupted,
    Interrupts,
    _first_new_folder,
    broadcast_object,
    n_processes,
    new_output_dir,
    process_number,
    unless_empty,
    write_json,
)
from vit_bridge.weights.checkpoints import load, save_model
from vit_model import InputError, VisionTransformer

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ProcessEnd(Exception):
    """Raised instead of os._exit."""


@pytest.fixture
def exits(monkeypatch):
    """Make os._exit raise ProcessEnd with the exit code."""
    def end(code):
        raise ProcessEnd(code)

    monkeypatch.setattr(os, "_exit", end)


@pytest.fixture
def launched(monkeypatch):
    """Imitate the second of three processes that torchrun started."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that shows clock[0]."""
    now = [100.0]
    monkeypatch.setattr("vit_bridge.system.time.monotonic", lambda: now[0])
    return now


def send(number):
    """Send a signal to this process; its handler has run when this returns."""
    signal.raise_signal(number)


def stopped(run, capsys):
    """Return (exit code, text on stderr) of script(run)."""
    with pytest.raises(SystemExit) as stop:
        script(run)
    return stop.value.code, capsys.readouterr().err


def raiser(error):
    def run():
        raise error

    return run


# ---- Arguments


@pytest.mark.parametrize(("kind", "text", "value"), [
    (int_at_least(1), "1", 1), (int_at_least(0), "0", 0), (int_at_least(2), str(10**30), 10**30), (seed(), "0", 0),
    (seed(), str(2**63 - 1), 2**63 - 1), (positive(), "1e-3", 1e-3), (positive(), "5e-324", 5e-324)])
def test_number_types_accept_values_in_range(kind, text, value):
    taken = kind(text)
    assert (taken, type(taken)) == (value, type(value))


@pytest.mark.parametrize(("kind", "text"), [
    (int_at_least(1), "0"), (int_at_least(0), "-1"), (seed(), "-1"), (seed(), str(2**63)), (positive(), "0"),
    (positive(), "-1"), (positive(), "nan"), (positive(), "inf"), (positive(), "1e999")])
def test_number_types_name_values_out_of_range(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=rf"\A{text} is out of range; expected a .*number[^\n]*\Z"):
        kind(text)


@pytest.mark.parametrize(("kind", "text", "words"), [
    (int_at_least(1), "1.5", "a whole number"), (int_at_least(1), "many", "a whole number"),
    (int_at_least(0), "", "a whole number"), (positive(), "ten", "a number")])
def test_number_types_name_words_that_are_no_numbers(kind, text, words):
    with pytest.raises(argparse.ArgumentTypeError, match=rf"\A'{text}' is not {words}; expected a [^\n]*\Z"):
        kind(text)


@pytest.mark.parametrize(("n", "text"), [(1, "1 step"), (2, "2 steps"), (1.0, "1 step"), (0.5, "0.5 steps"),
                                         (2000, "2,000 steps"), (0, "0 steps")])
def test_counted(n, text):
    assert counted(n, "step") == text


@pytest.mark.parametrize(("words", "expected"), [
    (["--learning-rate", "1"], "unknown option --learning-rate; did you mean --lr?"),
    (["--skip-corrup"], "unknown option --skip-corrup; did you mean --skip-corrupt?"),
    (["--zzz=3"], "unknown option --zzz; --help lists the options"),
    (["photos", "more"], "unexpected 'photos'; --help lists the options")])
def test_one_line_parser_suggests_the_closest_option(capsys, words, expected):
    parser = OneLineParser(prog="name.py")
    parser.add_argument("--lr")
    parser.add_argument("--skip-corrupt", action="store_true")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(words)
    assert capsys.readouterr().err == f"name.py: {expected}\n"


def test_one_line_parser_reports_an_error_and_exits_with_2(capsys):
    parser = OneLineParser(prog="name.py")
    parser.add_argument("--n", type=int_at_least(3))
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--n", "2"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == ("name.py: argument --n: 2 is out of range; expected a whole number of at least "
                                       "3\n")


@pytest.mark.parametrize(("error", "code", "words"), [
    (InputError("no such model"), 2, "no such model"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
    (KeyboardInterrupt(), 130, "stopped by SIGINT"),
    (Interrupted(signal.SIGINT), 130, "stopped by SIGINT"),
    (Interrupted(signal.SIGTERM, "kept at step 3"), 143, "stopped by SIGTERM; kept at step 3")])
def test_script_ends_with_one_line_and_an_exit_code(error, code, words, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/where/name.py"])
    ended, text = stopped(raiser(error), capsys)
    assert ended == code
    assert text.startswith("name.py: ")
    assert text.endswith(f"{words}\n")
    assert text.count("\n") == 1


def test_script_keeps_the_traceback_of_a_bug():
    with pytest.raises(ZeroDivisionError):
        script(raiser(ZeroDivisionError()))


def test_script_ends_silently_on_a_closed_pipe():
    lines = "from vit_bridge.cli import script; script(lambda: [print('a line') for _ in range(100_000)])"
    child = subprocess.Popen([sys.executable, "-c", lines], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b"", 141)
    child.stderr.close()


@pytest.mark.parametrize("written", [True, False])
def test_unless_empty_removes_only_an_empty_folder_after_an_error(tmp_path, written):
    folder = tmp_path / "run"
    folder.mkdir()
    if written:
        (folder / "result.json").touch()
    with pytest.raises(InputError), unless_empty(folder):
        raise InputError("no such image")
    assert folder.exists() == written


def test_script_returns_none_on_success():
    assert script(lambda: None) is None


def test_script_names_its_process_among_several(launched, capsys):
    _, text = stopped(raiser(InputError("no such model")), capsys)
    assert text.startswith("[process 1] ")


# ---- Several processes


def test_n_processes_is_one_without_a_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # some schedulers set it for every job
    assert (n_processes(), process_number(), broadcast_object("value")) == (1, 0, "value")
    with processes("cpu") as device:
        assert device == torch.device("cpu")
        assert not torch.distributed.is_initialized()


def test_n_processes_comes_from_the_launcher(launched):
    assert (n_processes(), process_number()) == (3, 1)


def test_processes_refuses_an_unknown_device_first():
    with pytest.raises(InputError, match="abacus"), processes("abacus"):
        pytest.fail("entered")


@pytest.mark.parametrize("message", ["[..gloo/transport/tcp/pair.cc:534] Connection closed by peer\nmore"])
def test_processes_reports_the_end_of_another_process(message, launched, monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    with pytest.raises(InputError, match=r"\Aanother process stopped early [^\n]*\Z"), processes("cpu"):
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="shapes"), processes("cpu"):
        raise RuntimeError(print("of the second process") or "shapes do not fit")
    assert capsys.readouterr().out == ""  # only the first one prints


# ---- Interruptions


@pytest.mark.parametrize("number", SIGNALS)
def test_interrupts_raises_on_the_first_signal_and_names_it(number):
    with pytest.raises(Interrupted) as stop, Interrupts() as interrupts:
        send(number)
    assert stop.value.number == interrupts.caught == number
    assert isinstance(stop.value, KeyboardInterrupt)  # no `except Exception` on the way may swallow it


@pytest.mark.parametrize("number", SIGNALS)
def test_interrupts_only_notes_a_held_signal(number):
    with Interrupts() as interrupts:
        interrupts.held = True
        assert interrupts.caught is None
        send(number)
        assert interrupts.caught == number


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize(("second", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupts_exits_at_once_on_a_second_signal(second, code, held, exits):
    with Interrupts() as interrupts:
        interrupts.held = held
        with nullcontext() if held else pytest.raises(Interrupted):
            send(signal.SIGINT)
        with pytest.raises(ProcessEnd) as end:
            send(second)
    assert end.value.args == (code,)


def test_interrupts_in_a_group_merges_signals_within_a_second(launched, clock, exits):
    with Interrupts() as interrupts:
        interrupts.held = True
        send(signal.SIGINT)
        clock[0] += 0.9
        send(signal.SIGTERM)
        assert interrupts.caught == signal.SIGINT
        clock[0] += 0.2
        with pytest.raises(ProcessEnd):
            send(signal.SIGTERM)


def test_interrupts_alone_does_not_merge_signals(clock, exits):
    with Interrupts() as interrupts:
        interrupts.held = True
        send(signal.SIGINT)
        with pytest.raises(ProcessEnd):
            send(signal.SIGINT)


@pytest.mark.parametrize("error", [None, ValueError("inside")])
def test_interrupts_restores_the_handlers(error):
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ValueError, match="inside") if error else nullcontext(), Interrupts() as interrupts:
        assert [signal.getsignal(number) for number in SIGNALS] == [interrupts.handle] * 2
        if error:
            raise error
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_interrupts_leaves_handlers_alone_outside_the_main_thread():
    found, before = [], signal.getsignal(signal.SIGINT)

    def enter():
        with Interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]


# ---- Folders and text


def test_new_output_dir_counts_runs_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [new_output_dir(None, "vit", "photos").as_posix() for _ in range(3)]
    assert names == [f"runs/vit-photos-{n}" for n in (1, 2, 3)]
    (tmp_path / "runs" / "vit-photos-4").touch()  # a file of that name
    assert _first_new_folder(tmp_path / "runs" / "vit-photos").name == "vit-photos-5"


def test_new_output_dir_refuses_files_but_ignores_hidden_ones(tmp_path):
    (tmp_path / ".DS_Store").touch()
    assert new_output_dir(tmp_path, "vit", "photos") == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == [".DS_Store"]
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"already holds files; choose a new folder"):
        new_output_dir(tmp_path, "vit", "photos")


def test_new_output_dir_makes_parent_folders(tmp_path):
    assert new_output_dir(str(tmp_path / "a" / "b c"), "vit", "photos").is_dir()


def test_new_output_dir_names_why_it_cannot_write(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file is a file; choose a folder with --output-dir"):
        new_output_dir(tmp_path / "file", "vit", "photos")
    with pytest.raises(InputError, match=r"cannot write to --output-dir .*file.*Not a directory"):
        new_output_dir(tmp_path / "file" / "run", "vit", "photos")
    monkeypatch.setattr(Path, "touch", raiser_of_disk)
    with pytest.raises(InputError, match=r"cannot write to --output-dir .*Read-only file system"):
        new_output_dir(tmp_path / "run", "vit", "photos")


def raiser_of_disk(path, *_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def test_write_json_is_whole_and_readable(tmp_path):
    path = tmp_path / "a.json"
    write_json(dict(name="Grün", rate=1e-3, best=None), path)
    assert json.loads(path.read_text()) == dict(name="Grün", rate=1e-3, best=None)
    with pytest.raises(TypeError):
        write_json(dict(bad=object()), path)
    assert json.loads(path.read_text())["rate"] == 1e-3  # still the earlier contents
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_percent_shows_an_accuracy_with_its_interval():
    z, n, k = 1.959964, 80, 70
    middle, half = (k / n + z * z / 2 / n), z * math.sqrt(k / n * (1 - k / n) / n + z * z / 4 / n / n)
    low, high = (100 * (middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    assert percent(k, n) == f"87.5% ({low:.1f} to {high:.1f})"


def test_script_shows_an_assumption_in_one_line_on_stderr_and_other_warnings_as_python_does(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_vit.py"])
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *where, **more: shown.append(str(message)))

    def run():
        for _ in range(3):
            assume("n_heads: 12 assumed")
            warnings.simplefilter("always")  # after which Python forgets the warnings that it has shown
        warnings.warn("something else", stacklevel=1)

    script(run)
    assert capsys.readouterr().err == "train_vit.py: n_heads: 12 assumed\n"
    assert shown == ["something else"]


def test_script_shows_assumptions_of_the_first_process_only(capsys, launched):
    script(lambda: assume("n_heads: 12 assumed"))
    assert capsys.readouterr().err == ""


def test_assume_points_at_the_line_outside_the_package(tmp_path):
    save_model(VisionTransformer(8, 4, n_classes=2, embed_dim=8, depth=1, n_heads=1), tmp_path / "m.pt")
    with pytest.warns(Assumption) as caught:
        load(tmp_path / "m.pt")
    assert {one.filename for one in caught} == {__file__}


# ---- python visualizations.py photo.jpg


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Return (folder with a model tiny.pt and a.jpg, calls of explore), which here only records its calls."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model(VisionTransformer(8, 4, n_classes=3, embed_dim=8, depth=1, n_heads=2), tmp_path / "tiny.pt",
               Preprocessing(8, class_names=["ant", "bee", "cat"]))
    Image.effect_noise((24, 12), 90).convert("RGB").save(tmp_path / "a.jpg")
    calls = []

    def note(model, images, save_path, **options):
        calls.append(dict(options, images=images))
        Path(save_path).write_text("page")
        return ExplorerPage("page", Path(save_path), 16, 0.0, 0.0, ["1 of 2 is left out."], [(2, 4)])

    monkeypatch.setattr(visualizations, "explore", note)
    return tmp_path, calls


def look_at(*words):
    visualizations.main([*map(str, words), "--pretrained", "tiny.pt"])


FILES = ["colours.png", "explanation.png", "explorer.html", "heads.png", "look.json", "look.png", "norms.png",
         "photograph.png"]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_one_command_writes_pictures_and_page_and_prints_what_was_found(tiny, capsys):
    folder, calls = tiny
    look_at("a.jpg", "--max-mb", 3)
    assert names_in(folder / "look" / "a") == FILES
    assert calls[0]["whole"] == Whole()
    assert (calls[0]["images"], calls[0]["max_mb"], calls[0]["names"]) == (["a.jpg"], 3.0, [f"{folder.name}/tiny.pt"])
    said = capsys.readouterr().out
    for words in ("a.jpg\n", "1 block of 2 heads", "12 × 24 pixels", "nothing is cut off", "ant ", "look.png (",
                  "Page         1 of 2 is left out.", "Took"):
        assert words in said
    record = json.loads((folder / "look" / "a" / "look.json").read_text())
    assert record["of"] == dict(photograph=str(folder / "a.jpg"), model=f"{folder.name}/tiny.pt")


def test_look_takes_folders_and_gives_each_photograph_a_folder(tiny):
    folder, _ = tiny
    for sub in ("x", "y"):
        (folder / sub).mkdir()
        Image.new("RGB", (8, 9), "red").save(folder / sub / "b.png")
    look_at("x", "y/b.png", "a.jpg", "--output-dir", "out")
    assert names_in(folder / "out") == ["a", "b", "b-2"]
    assert all(names_in(folder / "out" / name) == FILES for name in ("a", "b", "b-2"))


def test_look_overwrites_only_its_own_files(tiny):
    folder, _ = tiny
    look_at("a.jpg", "--output-dir", "out")
    look_at("a.jpg", "--output-dir", "out")
    (folder / "other").mkdir()
    (folder / "other" / "look.png").write_text("mine")
    with pytest.raises(InputError, match=r"other has files that this command did not write .*choose a new"):
        look_at("a.jpg", "--output-dir", "other")
    assert (folder / "other" / "look.png").read_text() == "mine"
    with pytest.raises(InputError, match="did not write"):
        look_at("a.jpg", "--output-dir", "out", "--label", "another model")
    look_at("a.jpg")
    look_at("a.jpg", "--label", "another model")
    assert names_in(folder / "look") == ["a", "a-2"]


def test_look_crops_and_sizes_only_when_asked(tiny, capsys):
    folder, calls = tiny
    look_at("a.jpg", "--crop", "--output-dir", "1")
    look_at("a.jpg", "--img-size", 8, 16, "--output-dir", "2")
    look_at("a.jpg", "--max-tokens", 9, "--output-dir", "3")
    assert [call["whole"] for call in calls] == [None, Whole(img_size=(8, 16)), Whole(9)]
    out = capsys.readouterr().out
    assert "the model sees 8 × 8: 2 × 2 = 4 patches; only the centre, as in validation" in out
    assert out.count("Model        tiny.pt: ") == 3  # the path as it was given
    assert calls[0]["names"] == [f"{folder.name}/tiny.pt"]


@pytest.mark.parametrize(("words", "reason"), [
    (["no.jpg"], "there is no image file 'no.jpg'"), (["a.jpg", "tiny.pt"], "'tiny.pt' is not an image that Pillow"),
    (["empty"], "folder 'empty' has no image files"), (["a.jpg", "--crop", "--max-tokens", "4"], "or remove --crop"),
    (["a.jpg", "--output-dir", "a.jpg"], "cannot write to a.jpg"), (["a.jpg", "--img-size", "9"], "9x9")])
def test_look_ends_in_one_line_and_leaves_nothing(words, reason, tiny, capsys):
    folder, _ = tiny
    (folder / "empty").mkdir()
    code, said = stopped(lambda: look_at(*words), capsys)
    assert (code, said.count("\n")) == (2, 1)
    assert reason in said
    assert names_in(folder) == ["a.jpg", "empty", "tiny.pt"]


def test_look_without_a_network_takes_a_shipped_model_and_says_so(tiny, capsys, monkeypatch):
    folder, calls = tiny

    def refuse(url, path):
        raise TimeoutError("timed out")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder / "hub"))
    monkeypatch.setattr("vit_bridge.weights.pretrained.download", refuse)
    monkeypatch.setattr(visualizations, "WITHOUT_NETWORK", "vit_nano_shapes")
    script(lambda: visualizations.main(["a.jpg"]))
    out, err = capsys.readouterr()
    assert "cannot be downloaded (TimeoutError: timed out), so the shipped vit_nano_shapes is used" in err
    assert "about 88 MB, Apache-2.0" in err
    assert "Model        vit_nano_shapes (shipped; dinov2_vits14_reg could not be downloaded)" in out
    assert calls[0]["names"] == ["vit_nano_shapes (shipped; dinov2_vits14_reg could not be downloaded)"]
    code, err = stopped(lambda: visualizations.main(["a.jpg", "--pretrained", "deit_small_patch16_224"]), capsys)
    assert code == 2
    assert "cannot download deit_small_patch16_224" in err


def test_look_at_a_convnet_says_why_there_is_no_page(tiny, capsys):
    visualizations.main(["a.jpg", "--pretrained", "convnet_shapes"])
    assert "none: a CNN has no attention" in capsys.readouterr().out
    with pytest.raises(InputError, match="--max-tokens limits patches"):
        visualizations.main(["a.jpg", "--pretrained", "convnet_shapes", "--max-tokens", "4"])


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_begins_with_the_one_command_and_names_the_others(words, capsys):
    with pytest.raises(SystemExit) if words else nullcontext():
        visualizations.main(words)
    said = capsys.readouterr().out
    assert said.startswith("usage: python visualizations.py photo.jpg")
    assert "visualizations.py explore" in said
    assert "selfcheck" in said


def test_photograph_called_explore_is_given_by_its_path(tiny):
    folder, _ = tiny
    (folder / "a.jpg").rename(folder / "explore")
    look_at("./explore")
    assert names_in(folder / "look" / "explore") == FILES
