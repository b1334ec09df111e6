"""harness/settings.py and methods.py: every option is a flag, wrong ones end in one line, defaults."""

import re

import pytest
from short import METHODS

import data
import train
from harness import methods
from harness import settings as flags
from harness.settings import parse


def test_every_option_of_every_method_is_a_flag_with_its_help():
    text = re.sub(r"\s+", " ", flags.build_parser().format_help())
    seen = 0
    for method in METHODS:
        for option, (_, _, words) in methods.options(method).items():
            assert f"--{option.replace('_', '-')}" in text or f"--no-{option.replace('_', '-')}" in text
            assert words and len(words) > 10, (method, option)
            seen += 1
    assert seen > 30
    options = parse(["--method", "triadapt", "--delta", "2", "--preserve", "--mode", "nonlinear"]).options
    assert options["delta"] == 2 and options["preserve"] is True and options["mode"] == "nonlinear"
    assert options["rank_ref"] == methods.options("triadapt")["rank_ref"][1]


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--method", "lorra"], "argument --method: invalid choice: 'lorra' (choose from"),
        (["--task", "colla"], "argument --task: invalid choice: 'colla' (choose from"),
        (["--metod", "lora"], "unrecognized arguments: --metod lora"),
        (["--method", "lora", "--delta", "3"], "--delta is no option of lora (of: triadapt, increlora)"),
        (["--task", "wnli"], "task wnli needs --data DIR (generated are: cola, sst2"),
        (["--epochs", "0"], "0 is not a positive whole number"),
        (["--lr", "nan"], "nan is not a finite number from 0"),
        (["--warmup", "1.5"], "--warmup 1.5 is not below 1"),
        (["--betas", "0.9", "1"], "--betas 1.0 is not below 1"),
        (["--text", "a"], "--text goes with --data FILE and --label COLUMN"),
        (["--kind", "regression"], "--kind, --merge-labels and --classes-ok go with --text COLUMN, for a file of your own"),
        (["--merge-labels"], "--kind, --merge-labels and --classes-ok go with --text COLUMN"),
        (["--classes-ok"], "--kind, --merge-labels and --classes-ok go with --text COLUMN"),
        (
            ["--data", "a.csv", "--text", "a", "--label", "b", "--kind", "regression", "--merge-labels"],
            "--merge-labels and --classes-ok are for classes, --kind regression has scores",
        ),
        (["--data", "a.csv", "--text", "a", "--label", "b", "--kind", "scores"], "argument --kind: invalid choice: 'scores'"),
        (["--help", "--method", "lorra"], "argument --method: invalid choice: 'lorra' (choose from"),
        (["--label", "a"], "--label and --dev go with --text COLUMN"),
        (["--task", "sft", "--dev", "a.jsonl"], "task sft needs --data DIR"),
        (["--freeze-head", "--head-lr", "0.1"], "--head-lr is of the head that --freeze-head leaves alone"),
        (["--backbone", "x", "--dtype", "bf16", "--method", "houlsby"], "method houlsby trains the base's own weights or norms"),
        (["--width", "64"], "--width, --depth, --heads and --hidden go with --scratch"),
        (["--resume", "--overwrite"], "--resume goes on with the run that --overwrite replaces: leave one out"),
        (["--method", "dora", "--compare", "x"], "method dora has no low-rank update for --compare or --export-peft"),
        (["--method", "houlsby", "--backbone", "x", "--export-merged", "y"], "method houlsby cannot be merged"),
        (["--out", "x", "--compare", "./x"], "--out and --compare are the same place: it would be written over"),
        (["--method", "lora", "--compare", "out/cola-lora-0"], "--out and --compare are the same place"),
        (["--save-base", "x/y", "--base", "x/z/../y"], "--save-base and --base are the same place"),
        (["--backbone", "x", "--export-peft", "x"], "--export-peft and --backbone are the same place"),
        (["--backbone", "x", "--out", "y", "--export-merged", "y"], "--export-merged and --out are the same place"),
        (
            ["--backbone", "x", "--export-merged", "y", "--export-peft", "y"],
            "--export-merged and --export-peft are the same place",
        ),
        (["--export-peft", "x"], "--export-peft and --export-merged need --backbone"),
        (["--backbone", "x", "--scratch"], "--backbone is a model of its own"),
        (["--method", "lora", "--alpha", "nan"], "--alpha nan is not a finite number"),
        (["--orth", "inf"], "--orth inf is not a finite number"),
        (["--fixed-k", "3"], "--fixed-k goes with --mode fixed"),
        (["--scratch", "--base", "x"], "--scratch draws the weights, --base reads them"),
        (["--method", "bitfit", "--targets", "q_proj"], "method bitfit wraps no layers: leave --targets and --exclude out"),
        (["--data", "a.csv", "--text", "a", "b", "--label", "b"], "--label b is among the columns of --text"),
        (["--data", "a.csv", "--text", "a", "--label", "b", "--dev", "./a.csv"], "--dev is the same file as --data"),
        *(
            ([f"--{name}", ""], f"--{name} is empty")
            for name in (
                "out",
                "data",
                "label",
                "dev",
                "backbone",
                "base",
                "save-base",
                "export-peft",
                "export-merged",
                "compare",
                "answer",
                "template",
            )
        ),
        (["--save-base", "/"], "--save-base / is a folder: it names a file"),
        (["--threads", "100000"], "--threads 100000 is far more than"),
        (["--rank", "many"], "argument --rank: invalid int value: 'many'"),
    ],
)
def test_wrong_flags_end_in_one_line_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


def test_epochs_are_those_of_the_generated_task_unless_said_otherwise():
    assert [parse(argv.split()).epochs for argv in (
        "--task rte", "--task cola", "--task rte --epochs 4", "--task rte --data some/folder",
    )] == [flags.TASK_EPOCHS["rte"], flags.EPOCHS, 4, flags.EPOCHS]  # fmt: skip
    assert flags.TASK_EPOCHS["rte"] != flags.EPOCHS and set(flags.TASK_EPOCHS) < set(data.GENERATED)


def help_of(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    screen = capsys.readouterr()
    assert stop.value.code == 0 and screen.err == ""
    assert max(map(len, screen.out.splitlines())) <= 110
    return screen.out


def test_help_has_the_shared_options_as_a_table_of_method_and_default(capsys):
    text = help_of(["--help"], capsys)
    assert text == help_of(["-h"], capsys)
    columns, found = [], {}  # {(method, column): cell}
    for line in text[text.index("options that methods share:") : text.index("* a share of the run")].splitlines():
        cells = re.split(r" {2,}", line.strip())
        if cells[0] == "method":
            columns = cells[1:]
        elif cells[0] in METHODS:
            assert len(cells) == 1 + len(columns)
            found.update({(cells[0], column): cell for column, cell in zip(columns, cells[1:]) if cell != "-"})
    expected, everything = {}, {name: methods.options(name) for name in METHODS}
    for name, own in everything.items():
        expected[name, "lr"] = f"{methods.METHODS[name][2]:g}"
        expected[name, "lr (backbone)"] = f"{methods.BACKBONE_RATES[name][0]:g}"
        expected[name, "weight-decay"] = f"{methods.METHODS[name][3]:g}"
        for option, (_, default, _) in own.items():
            if sum(option in other for other in everything.values()) > 1:
                word = "*" if option in methods.FROM_RUN else "by model" if default == "" else f"{default:g}"
                expected[name, option.replace("_", "-")] = word
    assert found == expected and len(found) > 100
    assert "* a share of the run: --interval a fifteenth of the steps, --t0 the warm-up steps\n" in text


@pytest.mark.parametrize("method", METHODS)
def test_help_with_a_method_has_its_options_alone_with_its_defaults(method, capsys):
    text = re.sub(r"\s+", " ", help_of(["--method", method, "--help"], capsys))
    flags_there = set(re.findall(r"--(?!no-)[a-z0-9-]+(?=[ ,])", text))
    own = {"--" + option.replace("_", "-") for option in methods.options(method)}
    others = {"--" + option.replace("_", "-") for name in METHODS for option in methods.options(name)} - own
    assert own <= flags_there and not others & flags_there
    for option, (_, default, words) in methods.options(method).items():
        shown = methods.FROM_RUN[option][0] if option in methods.FROM_RUN else default
        assert f"{words} (default {shown})" in text
    _, words, rate, decay = methods.METHODS[method]
    assert f"peak learning rate (default {rate:g}; with --backbone {methods.BACKBONE_RATES[method][0]:g}: " in text
    assert f"AdamW's (default {decay:g})" in text and f"--method METHOD {words}" in text


def test_help_takes_the_method_from_a_file_of_flags_too(tmp_path, capsys):
    (tmp_path / "flags.txt").write_text("--method lora_xs\n")
    assert help_of(["--help", f"@{tmp_path / 'flags.txt'}"], capsys) == help_of(["--method=lora_xs", "-h"], capsys)
    assert parse([]).method == "triadapt"
