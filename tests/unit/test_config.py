"""Settings: the command line wins over the file, and nothing unknown passes."""

import importlib
from dataclasses import replace

import pytest

from harness.config import Config, Data, differences, flat, load_config, read_config, to_yaml
from harness.config.files import RENAMED, RENAMED_FILES
from harness.config.yaml_file import read_yaml
from harness.training.preflight import check_classes
from harness.training.state import open_data
from support.processes import ROOT

CONFIGS = ROOT / "configs"


def refused(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        read_config(arguments, CONFIGS / "demo.yaml")
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_file_is_valid_and_survives_being_saved(path, tmp_path):
    config = read_config(["--config", str(path)], path)
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "saved.yaml") == config
    assert read_config(["--config", str(tmp_path / "saved.yaml")], path) == config


def test_the_command_line_wins_wherever_it_stands():
    file = str(CONFIGS / "ham10000.yaml")
    for words in (
        ["--data.path", "x", "--config", file],
        ["--config", file, "--data.path", "x"],
        [f"--config={file}", "--data.path=x"],
    ):
        config = read_config(words, CONFIGS / "demo.yaml")
        assert config.data.path == "x"
        assert config.data.image_size == 224
        assert config.data.demo_images == 0  # nothing of the demo's file leaks into a named one


def test_the_demo_is_used_only_where_no_file_is_named():
    assert read_config([], CONFIGS / "demo.yaml").data.demo_images > 0


def test_unknown_keys_are_named(capsys, tmp_path):
    assert "batch_sizes" in refused(["--data.batch_sizes", "3"], capsys)
    (tmp_path / "bad.yaml").write_text("optim:\n  learning_rate: 3\n")
    assert "learning_rate" in refused(["--config", str(tmp_path / "bad.yaml")], capsys)


def test_wrong_types_and_missing_files_are_named(capsys):
    assert "data.global_batch_size" in refused(["--data.global_batch_size", "many"], capsys)
    assert "optim.name" in refused(["--optim.name", "lion"], capsys)
    assert "nowhere.yaml" in refused(["--config", "nowhere.yaml"], capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data.global_batch_size", "0"], "'data.global_batch_size' setting must be at least 2. Got 0"),
        (["--augment.crop_side", "[0.9, 0.5]"], "augment.crop_side"),
        (["--augment.hflip_prob", "1.5"], "'augment.hflip_prob' setting must be between 0 and 1. Got 1.5"),
        (["--optim.warmup_epochs", "50"], "'run.epochs'"),
        (["--optim.lr", "nan"], "optim.lr"),
    ],
)
def test_values_that_cannot_be_are_refused_with_key_and_value(words, expected, capsys):
    assert expected in refused(words, capsys)


def test_help_lists_every_setting_with_its_meaning(capsys):
    with pytest.raises(SystemExit):
        read_config(["--help"], CONFIGS / "demo.yaml")
    shown = capsys.readouterr().out
    for key in flat(Config()):
        assert f"--{key}" in shown
    assert "images in one optimizer step over all processes" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("script", "own"), [("train", "continue"), ("probe", "logistic regression"), ("preview", "--out FILE.png")]
)
def test_help_says_which_script_it_is_of(script, own, capsys):
    main = importlib.import_module(f"launch.{script}").main
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: launch/{script}.py ")
    assert own in shown.split("options:")[0]


def test_only_settings_that_change_the_result_count_as_different():
    old = Config()
    moved = replace(old, data=replace(old.data, path="elsewhere", threads=7))
    assert differences(flat(old), flat(moved)) == []
    other = replace(old, data=replace(old.data, global_batch_size=32))
    assert differences(flat(old), flat(other)) == ["data.global_batch_size: 64 is now 32"]
    assert differences({"data.gone": 1} | flat(old), flat(old)) == ["data.gone: 1 is now absent"]


def test_a_config_of_another_version_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(Config()).replace("image_size", "picture_size"))
    with pytest.raises(ValueError, match="another version of the harness"):
        load_config(tmp_path / "config.yaml")


def test_the_defaults_are_in_their_ranges():
    assert Config().data == Data()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ["--augment.mixup_prob", "0.7", "--augment.cutmix_prob", "0.6"],
            ("augment.mixup_prob", "augment.cutmix_prob"),
        ),
        (
            ["--augment.mixup_prob", "0.2", "--data.global_batch_size", "31"],
            ("augment.mixup_prob", "data.global_batch_size"),
        ),
        (["--optim.warmup_epochs", "9", "--run.epochs", "8"], ("optim.warmup_epochs", "run.epochs")),
        (["--optim.ema", "1.0"], ("optim.ema", "0.999")),
        (["--optim.max_grad_norm", "-1"], ("optim.max_grad_norm", "-1")),
        (["--eval.image_size", "8"], ("eval.image_size", "8")),
        (["--augment.cutout", "1.5"], ("augment.cutout", "1.5")),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused_with_both_keys(words, named, capsys):
    with pytest.raises(SystemExit):
        read_config(words, CONFIGS / "demo.yaml")
    error = capsys.readouterr().err
    assert all(name in error for name in named)


def test_mixing_and_balancing_one_class_is_refused(tiny_config):
    data = open_data(tiny_config)
    one = {name: 40 * (name == "mel") for name in data.dataset.classes}
    description = replace(data.dataset.description, counts={"train": one})
    lonely = replace(data, dataset=replace(data.dataset, description=description))
    mixed = replace(tiny_config, augment=replace(tiny_config.augment, cutmix_prob=0.5))
    sampled = replace(tiny_config, optim=replace(tiny_config.optim, balance="sampler"))
    for config, key in ((mixed, "augment.cutmix_prob"), (sampled, "optim.balance")):
        with pytest.raises(ValueError, match=rf"'{key}' .* needs several classes, and .* 'data.path'"):
            check_classes(config, lonely)
        assert check_classes(config, data) == []


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_setting_of_version_0_1_is_refused_by_its_new_name(old, new, capsys, tmp_path):
    assert f"The '{old}' setting is now {new}." in refused([f"--{old}", "1"], capsys)
    section, _, key = old.partition(".")
    (tmp_path / "old.yaml").write_text(f"{section}: {{{key}: 1}}\n")
    assert f"is now {new}." in refused(["--config", str(tmp_path / "old.yaml")], capsys)
    assert new.split(",")[0] in flat(Config())


@pytest.mark.parametrize("old", RENAMED_FILES)
def test_a_config_file_of_version_0_1_is_refused_by_its_new_name(old, capsys):
    assert f"is now {CONFIGS / RENAMED_FILES[old]}" in refused(["--config", str(CONFIGS / old)], capsys)
    assert (CONFIGS / RENAMED_FILES[old]).is_file()


def test_an_unknown_setting_is_one_line_with_the_nearest_names(capsys):
    for words in (["--optim.lrr", "1"], ["--optim.lr_", "1"], ["--optm.lr", "1"]):
        error = refused(words, capsys)
        assert error.count("\n") == 1
        assert "optim.lr" in error.partition("Did you mean")[2]
    assert refused(["--optim.name", "lion"], capsys) == (
        "error: The 'optim.name' setting must be one of adam, adamw, sgd. Got lion instead.\n"
    )


def test_settings_of_a_run_of_version_0_1_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {path: x, batch_size: 64}\n")
    with pytest.raises(ValueError, match=r"version 0.1 .*data.batch_size is now .*--model.weights"):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("value", ["auto", 0, 8])
def test_a_setting_of_two_types_is_read_back_as_it_was_written(tiny_config, tmp_path, value):
    config = replace(tiny_config, optim=replace(tiny_config.optim, micro_batch=value))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    (tmp_path / "config.yaml").write_text(to_yaml(config).replace(f"micro_batch: {value}", "micro_batch: some"))
    with pytest.raises(ValueError, match="micro_batch cannot be some"):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("model: {weights: null}", ["'model.weights' setting has no value (null)", "Write none"]),
        ("run: {folder: null}", ["'run.folder' setting has no value (null)", "leave the line out"]),
        ("data: {path: ~}", ["'data.path' setting has no value (null)"]),  # what a bare ~ is in YAML
    ],
)
def test_a_setting_without_a_value_is_named(tmp_path, capsys, line, words):
    (tmp_path / "null.yaml").write_text(line + "\n")
    error = refused(["--config", str(tmp_path / "null.yaml")], capsys)
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim: {lr: 0.1}\nrun: {epochs: 2}\noptim: {ema: 0.9}", "'optim' is there twice, in lines 1 and 3"),
        ("optim:\n  lr: 0.1\n  lr: 0.2", "'lr' is there twice, in lines 2 and 3"),
        ("run: {channels_last: on}", "one of auto, on, off. Got True instead. In a file, put it in quotes"),
    ],
)
def test_what_yaml_takes_for_something_else_is_refused(tmp_path, capsys, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SystemExit):
        read_config(["--config", str(tmp_path / "mine.yaml")])
    assert said in capsys.readouterr().err


def test_a_key_may_stand_beside_an_alias_that_brings_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("optim: &this {lr: 0.1}\nother: {<<: *this, lr: 0.2}")
    assert read_yaml(tmp_path / "mine.yaml")["other"] == {"lr": 0.2}


def test_a_run_is_written_to_a_folder(capsys):
    for key in ("folder", "checkpoint_dir"):
        with pytest.raises(SystemExit):
            read_config([f"--run.{key}", "s3://user:secret@bucket/run"])
        said = capsys.readouterr().err
        assert f"'run.{key}' setting must be a folder" in said
        assert "secret" not in said


def test_a_tilde_is_the_users_home_in_files_and_behind_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("data: {path: ~/packed}\nmodel: {weights: ~/w.safetensors}\n")
    config = read_config(["--config=~/mine.yaml", "--run.folder=~/runs/a"], CONFIGS / "demo.yaml")
    found = config.data.path, config.model.weights, config.run.folder
    assert found == tuple(f"{tmp_path}/{name}" for name in ("packed", "w.safetensors", "runs/a"))
