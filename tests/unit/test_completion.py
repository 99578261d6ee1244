"""`verst completion`: every command and option is completed, by bash itself where that is what is asked for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from verst import cli
from verst.cli import build_parser
from verst.cli.completion import commands_of

BASH = shutil.which("bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("verst.cli.completion.echo", said.append)
        assert cli.main(["completion", "bash"]) == 0
    path = tmp_path_factory.mktemp("bash") / "verst"
    path.write_text(said[0] + "\n")
    return path


def completed(script: Path, *words: str, cwd: Path | None = None) -> list[str]:
    """What bash offers for the last of the words."""
    assert BASH
    given = " ".join(f"'{word}'" for word in words)
    program = (
        f"source {script}; COMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; _verst 2>/dev/null; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run([BASH, "--norc", "-c", program], capture_output=True, text=True, check=True, timeout=30, cwd=cwd)
    return done.stdout.split("\n")[:-1]


@pytest.mark.skipif(BASH is None, reason="there is no bash")
def test_bash_completes_commands_options_choices_and_keys(script: Path, tmp_path: Path):
    assert set(completed(script, "verst", "")) == {*(c.name for c in commands_of(build_parser())), "--help", "--version"}
    assert completed(script, "verst", "ins") == ["inspect"]
    assert completed(script, "verst", "inspect", "runs/a", "--re") == ["--reward", "--reverse"]
    assert completed(script, "verst", "inspect", "runs/a", "--sort", "re") == ["reward"]
    assert completed(script, "verst", "init", "--algorithm", "") == ["grpo", "sft"]
    assert completed(script, "verst", "train", "f.yaml", "train.l") == ["train.lr="]
    assert completed(script, "verst", "completion", "z") == ["zsh"]
    (tmp_path / "runs").mkdir()
    assert completed(script, "verst", "watch", "ru", cwd=tmp_path) == ["runs"]
    assert completed(script, "verst", "train", "f.yaml", "data.path", "=", "ru", cwd=tmp_path) == ["runs"]
    assert completed(script, "verst", "watch", "train.l", cwd=tmp_path) == [""]  # which takes no options of run files


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_every_command_and_option(shell: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["completion", shell]) == 0
    said = capsys.readouterr().out
    for command in commands_of(build_parser()):
        assert command.name in said
        for option in command.options:
            assert option.removeprefix("--") in said
    assert "train.lr=" in said
    checker = shutil.which(shell)
    if checker:
        subprocess.run([checker, "-n"], input=said, text=True, check=True, timeout=30)


def test_every_command_has_help_with_examples_that_parse(capsys: pytest.CaptureFixture[str]):
    """Examples in the help are command lines that the parser takes."""
    for command in commands_of(build_parser()):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command.name, "--help"])
        said = capsys.readouterr().out
        examples = [line.strip() for line in said[said.index("examples:") :].splitlines()[1:]]
        lines = [line for line in examples if line.startswith("verst ")]
        assert lines, command.name
        for line in lines:
            words = line.split("   ")[0].split(" > ")[0].split()  # three blanks, then what it does; > FILE
            cli._parse(words[1:])
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {code:<5}" in said for code in (0, 1, 2, 129, 130))


def test_a_reader_that_leaves_is_no_failure_with_a_traceback(tmp_path: Path):
    import sys

    program = f"{sys.executable} -m verst.cli completion bash | head -c 10"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {program}"], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    assert len(done.stdout) == 10
