"""Mutation testing: change the code at random places, one at a time, and run the tests.

    python benchmarks/mutants.py                      draws 30 mutants
    python benchmarks/mutants.py --n 5 --seed 1       draws 5 different ones
    python benchmarks/mutants.py --keep               also keeps the outcome in benchmarks/results/

A mutant is a copy of the repository with one changed expression or statement in vit_bridge's data, weights, training or
analysis, or in the Trainer. Its kind is drawn first, then its position. The module's own tests run first, then the
tests that name the module, then all quick tests, then the slow tests of those files, until the first failure. A mutant
that survives shows a gap in the tests, unless it changes nothing; EQUIVALENT records the reason.
"""

import argparse
import ast
import difflib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from results import write_cell

ROOMS = ("data", "weights", "training", "analysis")  # of vit_bridge
TRAINER = {"train_vit.py": ("Trainer", "TrainState")}  # {file: classes}, outside these packages
COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "in": "not in", "not in": "in",
               "is": "is not", "is not": "is"}
SWAPS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*", "and": "or", "or": "and", "min": "max",
         "max": "min", "any": "all", "all": "any"}
ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%"}
TIMEOUT = 1200  # seconds of a test run; a mutant that makes the tests hang counts as killed

# Mutants that change nothing that a user could see: {(file, the changed line): reason}.
EQUIVALENT = {
    ("vit_bridge/data/loaders.py", 'def get_test_loader(data_dir=DEFAULT_DATA_DIR, batch_size=128, img_size=224, '
                                   'dataset="auto", val_fraction=0.2,'): "val_fraction changes nothing there",
}


# ---- Mutants ----------------------------------------------------------------------------------------------


class Places(ast.NodeVisitor):
    """The positions in a source file that can be changed: `found` is [(kind, start, end, new text)], in characters.

    Parameters
    ----------
    source : str
    classes : list of str, optional
        Names of top-level classes; only those are searched. None: the whole file.
    """

    def __init__(self, source, classes=None):
        self.source, self.found = source, []
        self.line_starts = [0]
        for line in source.splitlines(keepends=True):
            self.line_starts.append(self.line_starts[-1] + len(line))
        for node in ast.parse(source).body:
            if classes is None or getattr(node, "name", None) in classes:
                self.visit(node)

    def offset(self, line, column):
        """Turn a position of ast, whose columns are bytes, into an offset in characters."""
        start = self.line_starts[line - 1]
        text = self.source[start:self.line_starts[line]].encode()
        return start + len(text[:column].decode())

    def span(self, node):
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def swap(self, kind, start, end, swaps):
        """Add a swap of the operator in the text between two operands, which may also contain parentheses."""
        words = "|".join(re.escape(word) for word in sorted(swaps, key=len, reverse=True))
        operator = re.search(rf"(?<!\w)({words})(?!\w)" if kind == "and, or" else rf"({words})", self.source[start:end])
        if operator:
            self.found.append((kind, start + operator.start(), start + operator.end(), swaps[operator.group()]))

    def visit_Compare(self, node):
        operands = [node.left, *node.comparators]
        for one, other in pairwise(operands):
            self.swap("comparison", self.span(one)[1], self.span(other)[0], COMPARISONS)
        self.generic_visit(node)

    def visit_BinOp(self, node):
        sign = ARITHMETIC.get(type(node.op))
        if sign is not None:
            self.swap("arithmetic", self.span(node.left)[1], self.span(node.right)[0], {sign: SWAPS[sign]})
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        for one, other in pairwise(node.values):
            self.swap("and, or", self.span(one)[1], self.span(other)[0], {key: SWAPS[key] for key in ("and", "or")})
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.Not):
            start = self.span(node)[0]
            self.found.append(("not dropped", start, start + len("not "), ""))
        self.generic_visit(node)

    def visit_Call(self, node):
        name = node.func
        if isinstance(name, ast.Name) and name.id in ("min", "max", "any", "all"):
            self.found.append(("min, max", *self.span(name), SWAPS[name.id]))
        self.generic_visit(node)

    def visit_Constant(self, node, kind="constant"):
        changed = changed_constant(node.value)
        if changed is not None:
            self.found.append((kind, *self.span(node), changed))

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Call):
            self.removed(node)
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.generic_visit(node)

    def visit_AugAssign(self, node):
        self.removed(node)
        self.generic_visit(node)

    def visit_Raise(self, node):
        self.removed(node)

    def visit_Assign(self, node):
        if all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets):
            self.removed(node)
        self.generic_visit(node)

    def removed(self, node):
        self.found.append(("statement removed", *self.span(node), "pass"))

    def visit_FunctionDef(self, node):
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if isinstance(default, ast.Constant):
                self.visit_Constant(default, "default of an argument")
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit(node.value)

    def visit_JoinedStr(self, node):
        """Skip f-strings: text is not changed."""


def changed_constant(value):
    """Return the text of a different value of the same type; None for text and other types."""
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, int):
        return str(value + 1)
    if isinstance(value, float):
        return repr(2 * value if value else 1.0)
    return None


def all_places(root):
    """Return {kind: [(file, start, end, new text)]}, with files as paths from the root."""
    places, files = {}, {}
    for room in ROOMS:
        files |= {path: None for path in sorted((root / "vit_bridge" / room).glob("*.py"))}
    files |= {root / name: classes for name, classes in TRAINER.items()}
    for path, classes in files.items():
        for kind, *change in Places(path.read_text(encoding="utf-8"), classes).found:
            places.setdefault(kind, []).append((path.relative_to(root).as_posix(), *change))
    return dict(sorted(places.items()))


def draw_breaks(places, n, seed):
    """Draw n mutants, no position twice: [(kind, file, start, end, new text)].

    Each kind is equally likely, regardless of its number of positions.
    """
    chance, left, drawn = random.Random(seed), {kind: list(own) for kind, own in places.items()}, []
    while len(drawn) < n and any(left.values()):
        kind = chance.choice([kind for kind, own in left.items() if own])
        drawn.append((kind, *left[kind].pop(chance.randrange(len(left[kind])))))
    return drawn


def broken(source, start, end, text):
    return source[:start] + text + source[end:]


# ---- Tests ------------------------------------------------------------------------------------------------


def stages_of(file, root):
    """Return arguments for pytest, from the tests most likely to fail for this file to all tests."""
    path = Path(file)
    module, room = ".".join(path.with_suffix("").parts), path.parts[1] if len(path.parts) > 1 else "training"
    tests = sorted((root / "tests").rglob("test_*.py"))
    word = "trainer" if file in TRAINER else path.stem.rstrip("s")
    own = [test for test in tests if test.parent.name == room and word in test.stem]
    name = re.compile(rf"\b{re.escape(module)}\b")
    naming = [test for test in tests if test not in own and (
        test.parent.name == room or name.search(test.read_text(encoding="utf-8")))]
    near = [test.relative_to(root).as_posix() for test in own + naming]
    stages = [near[:len(own)], near[len(own):], ["tests"], ["-m", "slow", *near]]
    return [words for words in stages if words and words != ["-m", "slow"]]


def run_tests(root, words, stop=True):
    """Return (exit code, failed tests, last lines of output); the exit code is 124 if the tests hang."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *["-x"] * stop, *words]
    with tempfile.TemporaryDirectory() as scratch:
        env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", TMPDIR=scratch)
        try:
            done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return 124, ["a test that hangs"], ""
    failed = [line.split()[1] for line in done.stdout.splitlines() if re.match(r"(FAILED|ERROR) \S+", line)]
    return done.returncode, failed, (done.stdout + done.stderr)[-600:]


def who_sees(file, root):
    """Return the first test that fails, or None."""
    for words in stages_of(file, root):
        code, failed, _ = run_tests(root, words)
        if code not in (0, 5):  # 5: no tests were selected
            return failed[0] if failed else f"pytest ends with {code}"
    return None


def measure(root, breaks, report=print):
    """Run the tests on each mutant and return one row per mutant; root is a copy of the repository."""
    rows = []
    for kind, file, start, end, text in breaks:
        path = root / file
        source, started = path.read_text(encoding="utf-8"), time.monotonic()
        after = broken(source, start, end, text)
        line = source.count("\n", 0, start) + 1
        diff = [own for own in difflib.unified_diff(source.splitlines(), after.splitlines(), lineterm="", n=0)
                if own[0] in "+-" and own[:3] not in ("+++", "---")]
        changed = " ".join(own[1:].strip() for own in diff if own[0] == "+")
        path.write_text(after, encoding="utf-8")
        try:
            by = who_sees(file, root)
        finally:
            path.write_text(source, encoding="utf-8")
        reason = EQUIVALENT.get((file, changed))
        outcome = "killed" if by else "equivalent" if reason else "survived"
        rows.append(dict(file=file, line=line, kind=kind, diff=diff, outcome=outcome, by=by or reason,
                         seconds=round(time.monotonic() - started, 1)))
        report(f"{len(rows)}. {outcome}: {file}:{line} ({kind}), {by or reason or ''}, {rows[-1]['seconds']} s")
        for own in diff if not by else ():
            report(f"   {own}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--n", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutants (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument("--keep", action="store_true", help="keep the outcome in benchmarks/results/")
    options = parser.parse_args()
    breaks = draw_breaks(all_places(ROOT), options.n, options.seed)
    if options.list:
        for kind, file, start, end, text in breaks:
            source = (ROOT / file).read_text(encoding="utf-8")
            print(f"{file}:{source.count(chr(10), 0, start) + 1} ({kind}): {source[start:end]!r} -> {text!r}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "copy"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache"))
        code, failed, words = run_tests(root, ["tests"], stop=False)
        if code:
            sys.exit(f"these tests fail without any change: {' '.join(failed)}; fix them first\n{words}")
        rows = measure(root, breaks, lambda line: print(line, flush=True))
    counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ("killed", "equivalent",
                                                                                    "survived")}
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    if options.keep:
        command = f"python benchmarks/mutants.py --n {options.n} --seed {options.seed} --keep"
        write_cell("mutants", str(options.seed), options.seed, command, dict(device="cpu", **counts, rows=rows))


if __name__ == "__main__":
    main()
