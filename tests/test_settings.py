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
        for option, (_, default, words) in methods.options(method).items():
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
        (["--label", "a"], "--label and --dev go with --text COLUMN"),
        (["--export-peft", "x"], "--export-peft and --export-merged need --backbone"),
        (["--backbone", "x", "--scratch"], "--backbone is a model of its own"),
        (["--method", "lora", "--alpha", "nan"], "--alpha nan is not a finite number"),
        (["--orth", "inf"], "--orth inf is not a finite number"),
        (["--fixed-k", "3"], "--fixed-k goes with --mode fixed"),
        (["--scratch", "--base", "x"], "--scratch draws the weights, --base reads them"),
        (["--method", "bitfit", "--targets", "q_proj"], "method bitfit wraps no layers: leave --targets and --exclude out"),
        (["--data", "a.csv", "--text", "a", "b", "--label", "b"], "--label b is among the columns of --text"),
        (["--data", "a.csv", "--text", "a", "--label", "b", "--dev", "./a.csv"], "--dev is the same file as --data"),
        (["--out", ""], "--out is empty"),
        (["--backbone", ""], "--backbone is empty"),
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
