"""The table of docs/from-lightning.md that sets examples of Lightning beside those here: the lines of each are counted.

Those of Lightning were counted by the same function in a checkout at the commit that the page names:

    python tests/test_ported_examples.py CHECKOUT
"""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/from-lightning.md"
PARSER = {"parser", "argparse", "ArgumentParser"}
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str, left_out: str = "") -> int:
    """Count the lines of a Python file with code in them.

    Not counted are blank lines, comments, docstrings, statements that mention an argument parser, and definitions with
    the names of `left_out`: those that declare arguments, and those that download or read data.
    """
    names, found, lines = set(left_out.split()), set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                lines -= rows_of(node.body[0])
            if not isinstance(node, ast.Module) and node.name in names:
                found.add(node.name)
                lines -= rows_of(node)
        elif isinstance(node, ast.stmt) and (isinstance(node, ast.For) or not hasattr(node, "body")):
            mentioned = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            mentioned |= {
                a.name for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names
            }
            if mentioned & PARSER and not any(isinstance(n, ast.Return) for n in ast.walk(node)):
                lines -= rows_of(node)
    assert found == names, f"no definition of {names - found}"
    return len(lines)


def rows_of(node: ast.stmt) -> set[int]:
    decorators = [d.lineno for d in getattr(node, "decorator_list", ())]
    return set(range(min([node.lineno, *decorators]), (node.end_lineno or node.lineno) + 1))


@dataclasses.dataclass(frozen=True)
class Port:
    """An example of Lightning and the one here: each is files, with the definitions in them that are not counted."""

    name: str
    theirs: dict[str, str]
    ours: dict[str, str]


CARTPOLE = {"cartpole.py": ""}
PORTS = [
    Port(
        "fabric/image_classifier",
        {"fabric/image_classifier/train_fabric.py": ""},
        {"image_classifier.py": "Settings torchvision Folder digits"},
    ),
    Port(
        "fabric/dcgan",
        {"fabric/dcgan/train_fabric.py": ""},
        {"dcgan.py": "Settings Folder load"},
    ),
    Port("fabric/kfold_cv", {"fabric/kfold_cv/train_fabric.py": ""}, {"kfold.py": "load"}),
    Port("fabric/meta_learning", {"fabric/meta_learning/train_fabric.py": ""}, {"maml.py": "Settings"}),
    Port(
        "fabric/reinforcement_learning",
        {
            "fabric/reinforcement_learning/train_fabric.py": "",
            "fabric/reinforcement_learning/rl/agent.py": "PPOAgent",
            "fabric/reinforcement_learning/rl/loss.py": "",
            "fabric/reinforcement_learning/rl/utils.py": "strtobool parse_args",
        },
        {"ppo.py": "Settings", **CARTPOLE},
    ),
    Port(
        "pytorch/domain_templates/reinforce_learn_Qnet",
        {"pytorch/domain_templates/reinforce_learn_Qnet.py": ""},
        {"dqn.py": "Settings", **CARTPOLE},
    ),
    Port(
        "pytorch/domain_templates/computer_vision_fine_tuning",
        {"pytorch/domain_templates/computer_vision_fine_tuning.py": "CatDogImageDataModule MyLightningCLI cli_main"},
        {"finetune.py": "Settings load"},
    ),
    Port(
        "fabric/fp8_distributed_transformer",
        {"fabric/fp8_distributed_transformer/train.py": ""},
        {"float8_transformer.py": "Settings"},
    ),
    Port(
        "fabric/tensor_parallel",
        {"fabric/tensor_parallel/train.py": "", "fabric/tensor_parallel/parallelism.py": ""},
        {"tensor_parallel_gpt.py": "Settings"},
    ),
    Port(
        "pytorch/domain_templates/semantic_segmentation",
        {"pytorch/domain_templates/semantic_segmentation.py": "KITTI _create_synth_kitti_dataset"},
        {"segmentation.py": "Settings draw images_of"},
    ),
]


def total(folder: Path, files: dict[str, str]) -> int:
    return sum(code_lines((folder / file).read_text(), left_out) for file, left_out in files.items())


@pytest.mark.parametrize("port", PORTS, ids=lambda port: port.name)
def test_the_page_says_how_many_lines_an_example_has(port):
    links = ", ".join(f"[`examples/{file}`](../examples/{file})" for file in port.ours)
    match = re.search(rf"^\| `{port.name}` \| (\d+) \| {re.escape(links)} \| (\d+) \|", PAGE.read_text(), re.MULTILINE)
    assert match, f"| `{port.name}` | ... | {links} | {total(ROOT / 'examples', port.ours)} |"
    assert int(match.group(2)) == total(ROOT / "examples", port.ours)


def test_what_is_counted():
    source = '''"""A file.

of three lines"""
import argparse

import torch  # counted

# not counted


@cached
class Settings:
    lr: float = 1.0


def f(x):
    """Two
    lines."""
    text = """
    counted, as it is code"""

    return x


def main():
    parser = argparse.ArgumentParser(
        description="two lines")
    for name in ("a", "b"):
        parser.add_argument(name)
    args = parser.parse_args()
    f(args)
'''
    assert code_lines(source, "Settings") == 1 + 4 + 2  # import; f; main and its call
    assert code_lines(source) == 1 + 3 + 4 + 2
    with pytest.raises(AssertionError, match="no definition of"):
        code_lines(source, "Other")


if __name__ == "__main__":
    for each in PORTS:
        print(each.name, total(Path(sys.argv[1]) / "examples", each.theirs), total(ROOT / "examples", each.ours))
