import json

import pytest
import torch

from model import SMSR
from program import InputError
from tools.export_hub import main
from utility import write_json

pytest.importorskip("safetensors")


@pytest.fixture
def weights(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny.state_dict(), "w.pt")
    return tiny.eval()


def write_metrics(path="metrics.json", **entries):
    write_json(path, {"dataset": "Set5", "scale": 2, "model": "SMSR", "psnr_y": 37.504, "ssim_y": 0.95881} | entries)


def test_the_folder_holds_the_network_and_a_card(weights, tmp_path):
    write_metrics()
    main(["--pre_train", "w.pt", "--output", "out", "--license", "mit", "--results", "metrics.json"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    x = torch.rand(1, 3, 5, 6) * 255
    torch.testing.assert_close(SMSR.from_pretrained("out")(x), weights(x))
    card = (tmp_path / "out/README.md").read_text()
    assert "| Set5 | 37.50 | 0.9588 |" in card
    assert f"{weights.n_parameters:,} parameters" in card


@pytest.mark.parametrize("license_id", ["", "cc-by-4.0"])
def test_huggingface_hub_reads_the_metadata(weights, license_id):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    write_metrics(dataset="no: really")
    main(["--pre_train", "w.pt", "--output", "out", "--license", license_id, "--results", "metrics.json"])
    data = huggingface_hub.ModelCard.load("out/README.md").data
    assert data.license == (license_id or None)
    assert data.pipeline_tag == "image-to-image"
    assert {"super-resolution", "smsr"} <= set(data.tags)
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert found == {("no: really", "psnr"): 37.5, ("no: really", "ssim"): 0.9588}


def test_the_header_is_closed_and_has_one_entry_per_line(weights, tmp_path):
    main(["--pre_train", "w.pt", "--output", "out"])
    start, header, text = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    assert start == ""
    entries = dict(line.split(": ", 1) for line in header.splitlines())
    assert entries.keys() == {"pipeline_tag", "tags"}
    assert all(json.loads(value) for value in entries.values())
    assert "| set |" not in text


def test_mistakes(weights, tmp_path):
    write_metrics()
    write_metrics("x3.json", scale=3)
    write_metrics("text.json", psnr_y="inf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep me")
    for line, message in (
        ("--output full", "--output full: already exists; choose another name"),
        ("--output w.pt", r"--output w\.pt: already exists"),
        ("--output new --results x3.json", r"x3\.json: measures SMSR x3, not SMSR x2; give the metrics\.json"),
        ("--output new --results text.json", r"text\.json: psnr_y is 'inf', not a number"),
        ("--output new --results absent.json", r"absent\.json: No such file"),
    ):
        with pytest.raises(InputError, match=message):
            main(["--pre_train", "w.pt", *line.split()])
    assert (tmp_path / "full/mine.txt").read_text() == "keep me"
    assert not (tmp_path / "new").exists()
