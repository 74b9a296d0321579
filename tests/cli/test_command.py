"""``ine-callback``: what its help shows works, faults are one line, foreign text does not drive the terminal."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ine_callback.cli import main, parser
from ine_callback.report import example_report
from tests.helpers.attributions import of_tokens
from tests.helpers.effect_files import save_effect_files
from tests.helpers.report.hostile import hostile
from tests.helpers.row_files import save_row_files

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("show", "export", "compare", "html", "kairos", "tokens", "effects", "ask", "completion")
ESCAPES = "x\x1b]0;owned\x07\x1b[2J\x9b31m\nline"


@pytest.fixture(autouse=True)
def _reports(tmp_path: Path) -> None:
    example_report().save(tmp_path / "influence")
    example_report(seed=1).save(tmp_path / "other")
    save_row_files(tmp_path)
    save_effect_files(tmp_path)


def process(command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COLUMNS": "110"}
    return subprocess.run(command, env=env, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def as_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    return process([sys.executable, "-m", "ine_callback", *arguments])


def helps() -> dict[str, str]:
    """The help of every command, "" being the program's own."""
    texts = {"": parser().format_help()}
    (commands,) = (action for action in parser()._actions if action.dest == "==SUPPRESS==" or action.choices)
    return texts | {name: made.format_help() for name, made in commands.choices.items()}  # type: ignore[union-attr]


def examples(text: str) -> list[str]:
    return re.findall(r"^(?:  )?(ine-callback .*?)(?:\s+#.*)?$", text, re.MULTILINE)


def test_every_command_teaches_by_an_example() -> None:
    texts = helps()
    assert sorted(texts) == sorted(["", *COMMANDS])
    for name, text in texts.items():
        assert [line for line in examples(text) if line.startswith(f"ine-callback {name}".strip())], name


@pytest.mark.parametrize("line", sorted({line for text in helps().values() for line in examples(text)}))
def test_examples_of_the_help_work(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    if " ask " in line:
        pytest.skip("needs a trained module: tests/cli/test_ask_command.py")
    if "completion" in line:
        pytest.importorskip("shtab")
    if "tokens" in line:
        example_report().with_attributions(of_tokens()).save("influence")
    words = [word.replace("lightning_logs/version_0/", "") for word in shlex.split(line)[1:]]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out and not err


def test_shell_blocks_of_the_documentation_work(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/howto/reports.md").read_text("utf-8")
    section = page.partition("## From the shell")[2].partition("\n## ")[0]
    lines = [line for line in examples(section) if "completion" not in line]
    assert len(lines) >= 5
    for line in lines:
        assert main(shlex.split(line, comments=True)[1:]) == 0, capsys.readouterr().err


def test_it_runs_as_a_module_and_as_a_program() -> None:
    done = as_module("show", "influence")
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.strip() == str(example_report())
    (entry,) = [
        each for each in importlib.metadata.entry_points(group="console_scripts") if each.name == "ine-callback"
    ]
    assert entry.load() is main
    program = process([str(Path(sys.executable).with_name("ine-callback")), "show", "influence", "--json"])
    assert program.returncode == 0 and json.loads(program.stdout) == example_report().summary()


def test_reading_needs_no_torch() -> None:
    code = "import sys; from ine_callback.cli import main; main(['show', 'influence']); print('torch' in sys.modules)"
    assert process([sys.executable, "-c", code]).stdout.endswith("False\n")


def test_a_missing_package_is_named_with_the_remedy() -> None:
    code = (
        "import sys\n"
        "from ine_callback.cli import main\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('jinja2', 'shtab'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "assert main(['html', 'influence']) == main(['completion', 'zsh']) == 2\n"
    )
    done = process([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        'ine-callback: InfluenceReport.write_html needs jinja2; run: pip install "ine_callback[report]"\n'
        "ine-callback: ine-callback completion needs shtab; run: pip install shtab\n"
    )


def test_show_lists_the_rows_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    report = example_report()
    assert main(["show", "influence", "--query", "val", "--top", "25", "--bottom", "1", "--flagged", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: [line["row"] for line in lines] for name, lines in found.items()} == {
        "top": report.top(25, "val").rows.tolist(),
        "bottom": report.bottom(1, "val").rows.tolist(),
        "flagged": report.flagged(0.05, "val").rows.tolist(),
    }
    assert found["bottom"][0]["mu"] == report.bottom(1, "val")[0].mu
    assert main(["show", "influence", "--top", "40"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^ +\d+ +[+−]", out, re.MULTILINE)) == 40 and "more" not in out


def test_exit_status_says_whether_something_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "influence", "--flagged", "--q", "0"]) == 1
    assert main(["show", "influence", "--query", "val", "--flagged"]) == 0
    assert main(["compare", "influence", "other"]) == 0
    example_report(planted=(40, 41)).save("elsewhere")
    assert main(["compare", "influence", "elsewhere", "--json"]) == 1
    found = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert found["agreements"][0]["repeated"] == [] and found["agreements"][0]["flagged"] == [3, 2]


def test_export_writes_to_a_file_or_to_standard_output(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["export", "influence", "--format", "drop-list", "--query", "val margin"]) == 0
    assert capfdbinary.readouterr().out == b"row\n3\n17\n29\n"
    assert main(["export", "influence", "--format", "parquet", "--query", "val", "-o", "new/a.parquet"]) == 0
    assert capfdbinary.readouterr().out == b"new/a.parquet\n"
    assert pq.read_table("new/a.parquet")["mu"].to_pylist()[:59] == example_report().scores.mu[:59, 1].tolist()
    assert main(["export", "influence", "--format", "markdown"]) == 0
    assert capfdbinary.readouterr().out.decode() == example_report().to_markdown()


def test_html_is_the_report_that_python_writes(tmp_path: Path) -> None:
    example_report(12).save("small")
    assert main(["html", "small"]) == 0
    expected = example_report(12).write_html(tmp_path / "expected.html").read_text("utf-8")
    assert Path("small/report.html").read_text("utf-8") == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("show nowhere", "nowhere: no such folder"),
        ("show influence/meta.json", "no such folder"),
        ("show damaged", "scores.parquet is not a readable Parquet file"),
        ("show influence --query nope", "no query 'nope'; choose one of 'self', 'val', 'val margin'"),
        ("show influence --top 0", "k is 0"),
        ("show influence --q .1", "--q belongs to --flagged"),
        ("show influence --flagged --q 7", "q is 7.0"),
        ("export influence --format csv --q .1", "--q belongs to drop-list and keep-list"),
        ("export influence --format parquet", "name a file with -o"),
        ("export influence --format csv -o influence", "Is a directory"),
        ("compare influence short", "report 0 has 60 rows, report 1 50"),
        ("compare influence nowhere", "no such folder"),
        ("html nowhere", "no such folder"),
    ],
)
def test_faults_are_one_line_and_status_2(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (example_report().save("damaged") / "scores.parquet").write_bytes(b"PAR1 nonsense")
    example_report(50).save("short")
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert not out and message in err
    assert err.startswith("ine-callback: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    ["", "shwo influence", "show", "export influence", "export influence --format xls", "show influence --quer val"],
)
def test_wrong_usage_is_status_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ine-callback")


def test_faults_of_a_process_show_no_traceback() -> None:
    done = as_module("show", "nowhere")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_foreign_text_does_not_drive_the_terminal() -> None:
    hostile(ESCAPES).save("odd")
    seen = in_terminal(
        "show odd",
        "show odd --top 3 --flagged",
        "show odd --json",
        "show odd --query nope",
        f"show {shlex.quote(ESCAPES)}",
        "compare odd odd",
        "compare odd influence",
        "export odd --format csv",
        "export odd --format json",
        "export odd --format markdown",
    )
    assert seen.count("owned") > 60 and "\x1b[" in seen and "[0, 0, 0, 2, 2, 0, 2, 0, 0, 0]" in seen
    rest = re.sub(r"\x1b\[[\d;]*m", "", seen)  # colours are rich's own
    assert not {letter for letter in rest if not letter.isprintable()} - {"\r", "\n"}


def in_terminal(*lines: str) -> str:
    """Everything that a process with a terminal writes to it, the lines' exit statuses last."""
    ours, theirs = pty.openpty()
    env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    code = "import sys, shlex; from ine_callback.cli import main; print([main(shlex.split(s)) for s in sys.argv[1:]])"
    with subprocess.Popen([sys.executable, "-c", code, *lines], stdin=theirs, stdout=theirs, stderr=theirs, env=env):
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # Linux says so when the process has closed the terminal
            while part := os.read(ours, 1 << 16):
                seen += part
    os.close(ours)
    return seen.decode()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_fault(unbuffered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    example_report(20_000).save("large")
    command = (
        f"{shlex.quote(sys.executable)} -m ine_callback export large --format csv | head -n 1; echo ${{PIPESTATUS[0]}}"
    )
    done = process(["bash", "-c", command])
    head, status = done.stdout.splitlines()
    assert head.startswith('"row","query","mu"') and status == "141"
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_folders(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in (*COMMANDS, "drop-list"))


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    main(["completion", "bash"])
    (tmp_path / "complete.sh").write_text(capsys.readouterr().out)
    for words, expected in (
        (["ine-callback", "com"], {"compare", "completion"}),
        (["ine-callback", "show", "inf"], {"influence"}),
    ):
        line = f"""source complete.sh; COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
        $(complete -p ine-callback | sed -E 's/.*-F ([^ ]+).*/\\1/'); echo "${{COMPREPLY[@]}}" """
        assert set(process(["bash", "-c", line]).stdout.split()) == expected
