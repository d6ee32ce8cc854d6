"""benchmarks/on_gpu.sh: failures are kept and reported, and the other parts still run."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def module_of(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Return results.py with a folder of its own, which holds one table of the project."""
    module = module_of("results", monkeypatch)
    (tmp_path / "results").mkdir()
    shutil.copy(BENCHMARKS / "results" / "formats-all.json", tmp_path / "results")
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


@pytest.fixture
def on_gpu(monkeypatch):
    return module_of("on_gpu", monkeypatch)


@pytest.fixture
def check(on_gpu, tmp_path):
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir()
    return on_gpu.Check(tmp_path / "out", tmp_path / "scratch", torch.device("cpu"), dry_run=True)


def page_with(results, cells):
    """Return RESULTS.md without these cells and with them."""
    results.page()
    before = (results.HERE / "RESULTS.md").read_text()
    (results.HERE / "cells.json").write_text(json.dumps(cells))
    results.keep_gpu(results.HERE / "cells.json")
    results.page()
    return before, (results.HERE / "RESULTS.md").read_text()


def python(code):
    return [sys.executable, "-c", code]


# ---- Failures ---------------------------------------------------------------------------------------------


def test_check_keeps_the_output_of_a_failed_command(check):
    assert check.run("fine", python("print(1)"), 60) is None
    assert (check.out / "fine.log").read_text() == "1\n"
    assert check.run("bad", python("print('a word'); raise SystemExit(3)"), 60) == dict(error="exit status 3",
                                                                                        tail="a word\n")


@pytest.mark.slow
def test_check_ends_a_hanging_command_with_its_children(check):
    code = ("import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
            "print(child.pid, flush=True); child.wait()")
    found = check.run("long", python(code), 4)
    assert found["error"] == "ended after 4 s"
    child, deadline = Path(f"/proc/{int(found['tail'])}/stat"), time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:  # a killed process takes a moment to end
        time.sleep(0.05)
    assert not alive(child)


def alive(stat):
    try:
        return stat.read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_check_runs_the_other_parts_after_a_failure(check, monkeypatch):
    def broken():
        raise OSError("no room")

    monkeypatch.setattr(check, "measure", broken)
    monkeypatch.setattr(check, "test", lambda: check.keep("tests", "tests", [], dict(error="x")))
    monkeypatch.setattr(check, "train", lambda: check.keep("training", "vit_nano", [], dict(error="y")))
    check.run_all()
    cells = json.loads((check.out / "cells.json").read_text())
    assert [cell["result"]["error"] for cell in cells] == ["x", "OSError: no room", "y"]


def test_one_part_alone_leaves_the_other_parts_of_the_page(check, results, monkeypatch):
    for name in ("test", "measure", "train"):
        part = {"test": "tests", "measure": "throughput", "train": "training"}[name]
        monkeypatch.setattr(check, name, lambda part=part: check.keep(part, part, [], dict(error=f"{part} failed")))
    check.run_all()
    page_with(results, check.cells)
    check.cells = []
    check.run_all(["tests"])
    assert [cell["result"]["part"] for cell in check.cells] == ["tests"]
    _, after = page_with(results, check.cells)
    for part in ("tests", "throughput", "training"):
        assert after.count(f"{part} failed") == 1


def test_check_trains_nothing_without_images(check, on_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(on_gpu, "IMAGES", tmp_path / "data" / "photos")
    check.dry_run = False
    check.train()
    assert [cell["result"]["name"] for cell in check.cells] == list(on_gpu.TRAINED)
    assert {cell["result"]["error"] for cell in check.cells} == {
        "no images in data/photos/, and no photos.tar.xz beside it"}


def test_unpack_images_puts_the_archive_in_place(on_gpu, monkeypatch, tmp_path):
    (tmp_path / "train" / "bird").mkdir(parents=True)
    (tmp_path / "train" / "bird" / "1.jpg").write_text("a bird")
    with tarfile.open(tmp_path / "photos.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "train", "train")
    monkeypatch.setattr(on_gpu, "IMAGES", tmp_path / "photos")
    on_gpu.unpack_images()
    on_gpu.unpack_images()  # with nothing left to do
    assert (tmp_path / "photos" / "train" / "bird" / "1.jpg").read_text() == "a bird"


def test_measure_within_reports_a_failing_library(monkeypatch):
    throughput = module_of("throughput", monkeypatch)

    def broken(config):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(throughput.LIBRARIES, "timm", broken)
    column, cpu = throughput.dry_columns()[0], torch.device("cpu")
    assert throughput.measure_within(column, ["ours", "timm"], 1, cpu, 60) == dict(
        column="nano-2-inference-float32", device="cpu", error="RuntimeError: out of memory")
    assert throughput.measure_within(column, ["ours"], 1, cpu, -1)["error"] == "no time was left for it"


def test_measure_in_bfloat16(monkeypatch):
    throughput = module_of("throughput", monkeypatch)
    monkeypatch.setitem(throughput.PRODUCT_SIDES, "cpu", 32)  # a CPU may lack the instructions for bfloat16
    found = throughput.measure(throughput.Column("vit_nano", 2, True, "bf16"), ["ours"], 1, torch.device("cpu"))
    assert found["column"] == "nano-2-training-bf16"
    assert found["libraries"]["ours"]["images_per_second"] > 0


REPORT = """<testsuites><testsuite time="7.5">
<testcase name="test_a"/><testcase name="test_b"><failure message="bf16: off&#10;more">the trace</failure></testcase>
<testcase name="test_c"><skipped message="no CUDA"/></testcase></testsuite></testsuites>"""


def test_results_page_shows_a_failed_test_with_its_reason(check, on_gpu, results, tmp_path):
    (tmp_path / "report.xml").write_text(REPORT.replace("the trace", f"{on_gpu.ROOT}/tests/a.py: the trace"))
    found = on_gpu.read_report(tmp_path / "report.xml")
    assert found["failed"] == [dict(test="test_b", reason="bf16: off", tail="tests/a.py: the trace")]
    check.keep("tests", "tests", [], found)
    check.keep("throughput", "base-128-training-bf16", [], dict(error="out of memory"))
    before, page = page_with(results, check.cells)
    assert page.startswith(before)
    assert "## gpu" not in before
    for line in ("Tests: 1 passed, 1 failed, 1 skipped, in 8 s.", "- failed: test_b: bf16: off",
                 "- skipped: test_c: no CUDA", "- base-128-training-bf16: not measured, out of memory"):
        assert f"\n{line}\n" in page


def test_keep_gpu_fills_in_an_unknown_commit(check, results):
    check.keep("tests", "tests", [], dict(error="x"))
    check.cells[0]["commit"] = "unknown"
    page_with(results, check.cells)
    kept = [json.loads(path.read_text()) for path in (results.HERE / "results").glob("gpu-*.json")]
    assert [cells[0]["commit"] for cells in kept] == [results.commit()]


# ---- The whole check --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_gpu_dry_run_goes_through_all_parts(results, tmp_path):
    done = subprocess.run([BENCHMARKS / "on_gpu.sh", tmp_path / "out", "--dry-run"], capture_output=True, text=True,
                          env=os.environ | dict(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"))
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads((tmp_path / "out" / "cells.json").read_text())
    assert [cell["result"]["name"] for cell in cells] == [
        "tests", "nano-2-inference-float32", "nano-2-training-float32-compiled", "vit_nano", "hybrid", "convnet"]
    assert not any("error" in cell["result"] for cell in cells)
    before, page = page_with(results, cells)
    assert page.startswith(before)
    section = page[len(before):]
    for line in ("dry run\n", "Tests: 3 passed, 0 failed, 0 skipped", "| nano-2-inference-float32 |",
                 "| convnet | 0 |"):
        assert line in section


@pytest.mark.slow
def test_trials_are_packed_with_those_that_they_started_from(on_gpu, check, monkeypatch, tmp_path):
    (tmp_path / "unfinished").mkdir()
    for name in ("cues-x", "reach-x", "unfinished/data-y"):
        (tmp_path / f"{name}.json").write_text("{}")
    monkeypatch.setattr(on_gpu, "RESULTS", tmp_path)
    check.run_all(["trials"])
    result = check.cells[0]["result"]
    assert result["stopped"] == [], (check.out / "trials-data.log").read_text()
    assert result["trials"] == 2
    with tarfile.open(check.out / "trials.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["trials", "trials/cues-x.json", "trials/data-y.json"]


def test_trials_that_stop_are_named_and_packed(on_gpu, check, monkeypatch, tmp_path):
    monkeypatch.setattr(on_gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(check, "run", lambda name, *_: dict(error=f"{name} ended after 1 s", tail=""))
    check.run_all(["trials"])
    stopped = [f"trials-{names} ended after 1 s" for names in ("data", "cues")]
    assert check.cells[0]["result"]["stopped"] == stopped
    assert "0 files, trials-data ended after 1 s" in on_gpu.summary(check.cells)
    assert (check.out / "trials.tar.gz").exists()
