"""The doctor sees what would spoil a run, and names what mends it."""

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.config import Config, Data, Model, Optim
from harness.distributed.world import World
from harness.model.build import build_model, outline
from harness.training.check import refuse_failures
from harness.training.machine import check_consistency, check_data_files, check_gpu, check_named_gpu
from harness.training.preflight import _check_on_main, check_evaluation, check_recipe, check_weights, preflight
from harness.training.state import open_data
from harness.training.storage import check_disk
from harness.training.train import train
from launch.doctor import main
from shards.index import load
from support.processes import Begun, command, ended, launch, start

OLD = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]  # torch 2.7's
NEW = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # torch 2.15's


def test_a_p100_needs_an_older_torch_and_is_told_which():
    (found,) = check_gpu("Tesla P100", (6, 0), NEW)
    assert found.level == "fail"
    assert "no kernels for Tesla P100 (sm_60)" in found.message
    assert 'pip install -e ".[legacy-gpu]"' in found.fix


def test_a_p100_with_that_torch_is_fine_and_has_neither_bf16_nor_compile():
    (found,) = check_gpu("Tesla P100", (6, 0), OLD)
    assert found.level == "ok"
    for word in ("fp16 with a loss scaler", "no tensor cores", "no TF32", "no torch.compile"):
        assert word in found.message


@pytest.mark.parametrize(("name", "capability"), [("p100", "sm_60"), ("H100", "sm_90"), ("8.9", "sm_89")])
def test_a_gpu_that_is_not_here_can_be_asked_about(name, capability):
    assert capability in check_named_gpu(name)[0].message


def test_an_unknown_gpu_is_an_error_with_the_known_ones(capsys):
    assert main(["--gpu", "voodoo2"]) == 1
    assert "h100" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--gpu", "a100", "--typo.x", "3"])
    assert "no other words: --typo.x 3" in capsys.readouterr().err


def test_ranks_that_differ_are_named():
    here = {
        "torch": "2.15.0",
        "torchvision": "1",
        "accelerate": "1",
        "dermharness": "0",
        "python": "3",
        "dataset": "ab",
    }
    ranks = [("first", here), ("second", here), ("third, process 7", here | {"torch": "2.7.1", "dataset": "cd"})]
    found = check_consistency(SimpleNamespace(all_gather_objects=lambda value: ranks, host_pid="first"), "ab")
    assert [check.message for check in found] == [
        "torch is 2.7.1 on rank 2 (third, process 7) and 2.15.0 on rank 0",
        "dataset is cd on rank 2 (third, process 7) and ab on rank 0",
    ]
    with pytest.raises(ValueError, match=r"torch is 2.7.1 on rank 2.*To fix it: install the same"):
        refuse_failures(found)


def test_a_damaged_shard_is_found(packed, tiny_config, tmp_path):

    folder = shutil.copytree(packed, tmp_path / "data")
    file = folder / load(folder).shards[0].file
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    config = replace(tiny_config, data=replace(tiny_config.data, path=str(folder)))
    (found,) = check_data_files(config)
    assert found.level == "fail"
    assert file.name in found.message
    (found,) = check_data_files(tiny_config)
    assert found.level == "ok"


def test_classes_and_columns_that_the_data_lack_are_warned_of(tiny_config):
    data = open_data(tiny_config)
    assert check_evaluation(tiny_config, data) == []
    named = replace(tiny_config.eval, positive_classes=("mel", "melanoma", "mel+nevus"), subgroups=("sex", "clinic"))
    found = check_evaluation(replace(tiny_config, eval=named), data)
    assert [check.level for check in found] == ["warn", "warn"]
    assert "no threshold for melanoma, mel+nevus (eval.positive_classes): the classes are" in found[0].message
    assert "no subgroups by clinic" in found[1].message


def test_a_full_disk_is_found(tiny_config, monkeypatch):
    monkeypatch.setattr("harness.training.storage.disk_usage", lambda path: SimpleNamespace(free=10**6))
    (found,) = check_disk(tiny_config, outline(tiny_config.model.name, 7))
    assert found.level == "fail"
    assert "1 MB free" in found.message


@pytest.mark.parametrize("setting", ["folder", "checkpoint_dir"])
def test_a_place_that_cannot_be_written_is_found(tiny_config, monkeypatch, tmp_path, setting):
    (tmp_path / "file").write_text("")
    config = replace(tiny_config, run=replace(tiny_config.run, **{setting: str(tmp_path / "file" / "x")}))
    found = check_disk(config, outline(tiny_config.model.name, 7))
    assert [check.message for check in found if check.level == "fail"] == [
        f"run.{setting} {tmp_path}/file/x cannot be written: {tmp_path}/file is no folder"
    ]
    assert not list(tmp_path.glob("**/tmp*"))

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("harness.training.storage.TemporaryFile", refuse)
    (found,) = check_disk(tiny_config, outline(tiny_config.model.name, 7))
    assert found.level == "fail"
    assert found.message.endswith("Permission denied")


def test_checkpoints_in_a_local_folder_are_counted(tiny_config, monkeypatch, tmp_path):
    """Those of this run alone: the folder may hold others."""
    run, local = tmp_path / "run", tmp_path / "local"
    config = replace(tiny_config, run=replace(tiny_config.run, folder=str(run), checkpoint_dir=str(local)))
    model = outline(tiny_config.model.name, 7)
    monkeypatch.setattr("harness.training.storage.disk_usage", lambda path: SimpleNamespace(free=6 * 10**6))
    (of_run, of_local) = check_disk(config, model)
    assert {of_run.level, of_local.level} == {"fail"}
    assert "name another --run.checkpoint_dir" in of_local.fix
    for folder in (run, local / "0123456789abcdef"):
        (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
        (folder / "checkpoints" / "step-00000001" / "model.safetensors").write_bytes(b"x" * 10**7)
    assert [check.level for check in check_disk(config, model)] == ["ok", "fail"]
    (run / "id").write_text("0123456789abcdef")
    assert [check.level for check in check_disk(config, model)] == ["ok", "ok"]


def test_weights_fit_or_will_be_downloaded(tiny_config, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name, model = "shufflenet_v2_x0_5", outline("shufflenet_v2_x0_5", 7)
    config = replace(tiny_config, model=replace(tiny_config.model, name=name, weights="imagenet1k_v1"))
    (found,) = check_weights(config, model, None)
    assert found.level == "warn"
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / re.search(r"shufflenet\S+\.pth", found.message)[0]
    torch.save(build_model(name, 1000).state_dict(), file)
    (found,) = check_weights(config, model, None)
    assert (found.level, "2 missing (fc.weight, fc.bias)" in found.message) == ("ok", True)


def test_the_doctor_fails_where_training_would_refuse_the_weights(tiny, tiny_config, tmp_path, capsys):
    """Also that the run folder was not claimed: the setting can be mended without a word about a change."""
    torch.save(build_model("resnet18", 7).state_dict(), tmp_path / "other.pth")
    weights = replace(tiny_config.model, name="shufflenet_v2_x0_5", weights=str(tmp_path / "other.pth"))
    config = replace(tiny_config, model=weights, run=replace(tiny_config.run, folder=str(tmp_path / "run")))
    checks, _ = preflight(config, World("fp32"))
    (failed,) = [check for check in checks if check.level == "fail"]
    assert (failed.name, "does not fit ShuffleNetV2" in failed.message) == ("weights", True)
    with pytest.raises(ValueError, match="does not fit ShuffleNetV2"):
        train(config, World("fp32"))
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
def test_the_doctor_on_several_processes_says_that_a_file_of_weights_is_damaged(tiny, tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"x" * 100)
    done = launch("doctor", "--config", tiny, "--model.weights", tmp_path / "damaged.safetensors", ranks=2)
    assert done.returncode == 1
    assert re.search(r"FAIL +weights +Cannot read the weights file", done.stdout), done.stdout + done.stderr


@pytest.mark.slow
def test_the_doctor_passes_the_tiny_run(tiny):
    done = launch("doctor", "--config", tiny, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "all checks passed" in done.stdout
    assert re.search(r"all-reduce  64 MiB over 2 processes in \d+ ms", done.stdout)
    assert "FAIL" not in done.stdout


@pytest.mark.slow
def test_the_doctor_says_what_to_do_about_a_missing_dataset(tiny):
    done = launch("doctor", "--config", tiny, "--data.path", "nowhere")
    assert done.returncode == 1
    assert "FAIL  data" in done.stdout
    assert "python -m shards pack" in done.stdout


@pytest.mark.slow
def test_a_precision_of_the_launcher_that_the_device_lacks_is_refused(tiny):
    words = command("train", "--config", tiny, "--run.precision", "auto")
    _, errors = ended(start(words, ACCELERATE_MIXED_PRECISION="fp16"), 60)
    assert "fp16 needs a GPU" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_process_that_meets_nobody_ends_in_time_with_one_sentence(tiny, tmp_path):
    words = command("driven", "--config", tiny, "--run.folder", tmp_path / "run")
    alone = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29655", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    seconds, errors = ended(Begun(words, COLLECTIVE_TIMEOUT_S="3", **alone), 60)
    assert seconds < 50
    assert re.search(r"error: Process 1 of 2 on .* did not meet the others at localhost:29655", errors), errors


def recipe(
    batch: int,
    ranks: int,
    n_batches: int = 100,
    model: str = "resnet18",
    stored=(341, 256),
    sync_batchnorm=False,
    **optim,
) -> list[str]:
    config = Config(
        data=Data(global_batch_size=batch), model=Model(sync_batchnorm=sync_batchnorm), optim=Optim(**optim)
    )
    return [f.message + "; " + f.fix for f in check_recipe(config, outline(model, 7), n_batches, ranks, stored)]


def test_few_images_on_each_process_and_few_steps_are_warned_of_with_what_to_do():
    assert recipe(64, 4) == []
    (text,) = recipe(64, 8)
    assert "sees 8 images at a time (64 over 8 process(es))" in text
    assert "--data.global_batch_size" in text
    assert "sees 8 images" in recipe(64, 1, micro_batch=8)[0]
    assert recipe(64, 8, model="convnext_tiny") == []  # no batch normalisation
    (alone,) = recipe(8, 1)
    assert "sync_batchnorm" not in alone
    assert "sync_batchnorm" in recipe(64, 8)[0]
    assert recipe(64, 8, sync_batchnorm=True) == []
    (text,) = recipe(8, 2, sync_batchnorm=True)
    assert "sees 8 images" in text
    assert "sync_batchnorm" not in text
    assert "an epoch has 9 steps" in recipe(640, 8, n_batches=9)[0]


def test_images_that_would_be_enlarged_are_warned_of_with_the_size_to_pack():
    assert recipe(64, 4, stored=(299, 224)) == []
    (text,) = recipe(64, 4, stored=(160, 120))
    assert "stored at 160x120 and enlarged to 224 pixels" in text
    assert "--size 299x224" in text


WRONG = {
    "an unknown model": ("model", {"name": "resnet7000"}, "'model.name'"),
    "weights that do not exist": ("model", {"weights": "nowhere.pth"}, "nowhere.pth not found"),
    "weights that torchvision lacks": ("model", {"name": "resnet18", "weights": "imagenet1k_v2"}, "no imagenet1k_v2"),
    "a size that the model cannot take": ("model", {"name": "alexnet"}, "cannot take"),
    "SyncBatchNorm on a CPU": ("model", {"sync_batchnorm": True}, "needs GPUs"),
    "unknown views": ("eval", {"views": "spirals"}, "'eval.views'"),
    "a split that is not there": ("eval", {"split": "extra"}, "no split 'extra'"),
    "an unknown tracker": ("run", {"trackers": ("notebook",)}, "'run.trackers'"),
    "too large a batch": ("data", {"global_batch_size": 512}, "too few for one batch"),
    "no data": ("data", {"path": "nowhere"}, "python -m shards pack"),
}


def changed(config: Config, section: str, values: dict) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **values)})


@pytest.mark.parametrize(("section", "values", "sentence"), WRONG.values(), ids=WRONG)
def test_what_training_refuses_the_doctor_finds(tiny_config, tmp_path, section, values, sentence):
    config, world = changed(tiny_config, section, values), World("fp32")
    checks, _ = preflight(config, world)
    failed = [check for check in checks if check.level == "fail"]
    assert any(sentence in check.message for check in failed), checks
    with pytest.raises(ValueError, match=re.escape(sentence)):
        train(config, world)
    assert not (tmp_path / "run").exists()  # refused before anything is written


def test_the_doctor_finds_nothing_wrong_with_the_tiny_run(tiny_config):
    checks, data = preflight(tiny_config, World("fp32"))
    assert data is not None
    assert [check for check in checks if check.level == "fail"] == []


def test_a_dataset_that_leaks_fails_unless_it_is_allowed(tiny_config, monkeypatch):
    data = open_data(tiny_config)
    monkeypatch.setattr("shards.leaks.load_groups", lambda dataset, split: np.arange(7, dtype=np.uint64))
    for allowed in (False, True):
        config = changed(tiny_config, "data", {"allow_leak": allowed})
        found = _check_on_main(config, 1, torch.device("cpu"), data)
        assert any(check.level == "fail" and "leak" in check.message for check in found) != allowed


def test_more_processes_than_images_of_a_batch_fail(tiny_config):
    (found,) = (
        check
        for check in _check_on_main(tiny_config, 13, torch.device("cpu"), open_data(tiny_config))
        if check.level == "fail"
    )
    assert "12 images for 13 processes" in found.message


def test_a_run_folder_with_other_settings_fails_before_anything_is_written(finished_run, tiny_config):
    config = changed(tiny_config, "run", {"folder": str(finished_run), "epochs": 9})
    checks, _ = preflight(config, World("fp32"))
    (failed,) = (check for check in checks if check.level == "fail")
    assert "run.epochs: 3 is now 9" in failed.message


def test_the_doctor_prints_every_failure(tiny, capsys):
    words = ["--config", str(tiny), "--model.name", "resnet7000", "--eval.views", "spirals"]
    assert main(words) == 1
    printed = capsys.readouterr().out
    assert "'model.name'" in printed
    assert "'eval.views'" in printed
    assert "checks failed" in printed
