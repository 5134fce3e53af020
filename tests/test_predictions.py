"""Predictions of all ranks become one table, and files that are whole or not there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from crashes import dies_at

from fasttrain import metrics, predictions
from fasttrain.batch import Batch
from fasttrain.predictions import Collector, Predictions
from fasttrain.sampling import Draw

CLASSES = ["ant", "bee, wild", "cat", "dog"]  # the last one has no images
FOUND = Predictions(
    label=np.array([0, 1, 1, 2, 2, 2]),
    predicted=np.array([0, 0, 0, 1, 2, 0]),
    in_top5=np.array([True, True, False, True, True, True]),
    confidence=np.array([0.5, 0.25, 1, 0.123456, 0.75, 0.5], np.float32),
    label_probability=np.array([0.5, 0.125, 0, 0.1, 0.75, 0.25], np.float32),
)


def batch_of(ids: list[int], labels: list[int]) -> Batch:
    draw = Draw(np.array(ids), np.zeros((len(ids), 4), np.float32), np.zeros(len(ids), bool), 32)
    return Batch(torch.zeros(len(ids), 3, 32, 32), torch.tensor(labels), draw)


@pytest.mark.parametrize("num_classes", [3, 12])
def test_predictions_agree_with_the_sums_and_are_in_the_order_of_the_split(
    num_classes: int,
) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(7, num_classes), torch.randint(num_classes, (7,))
    collector, sums = Collector(), metrics.EvalSums(torch.device("cpu"))
    for ids in ([3, 4, 5], [6], [0, 1, 2]):
        collector.add(batch_of(ids, labels[ids].tolist()), logits[ids].bfloat16())
        sums.add(logits[ids].bfloat16(), labels[ids])
    found, result = collector.gather(7), sums.result()
    assert found.label.tolist() == labels.tolist()
    assert round(100 * float((found.predicted == found.label).mean()), 6) == result["top1"]
    assert round(100 * float(found.in_top5.mean()), 6) == result["top5"]
    probabilities = logits.bfloat16().float().softmax(1)
    np.testing.assert_allclose(found.confidence, probabilities.max(1).values, rtol=1e-6)
    own = probabilities[torch.arange(7), labels]
    np.testing.assert_allclose(found.label_probability, own, rtol=1e-6)


def test_a_missing_or_repeated_image_is_found() -> None:
    collector = Collector()
    assert len(collector.gather(0).label) == 0  # a rank may have no batch
    collector.add(batch_of([0, 1], [0, 1]), torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="2 predictions are not one for each of 3"):
        collector.gather(3)
    collector.add(batch_of([1], [1]), torch.randn(1, 3))
    with pytest.raises(RuntimeError, match="3 predictions are not one for each of 3"):
        collector.gather(3)


def test_the_files_of_an_evaluation(tmp_path: Path) -> None:
    predictions.write(tmp_path, {"top1": 33.3}, FOUND, CLASSES)
    assert (tmp_path / "predictions.csv").read_text() == (
        "sample,label,predicted,confidence,label_probability\n"
        "0,ant,ant,0.5000,0.5000\n"
        '1,"bee, wild",ant,0.2500,0.1250\n'
        '2,"bee, wild",ant,1.0000,0.0000\n'
        '3,cat,"bee, wild",0.1235,0.1000\n'
        "4,cat,cat,0.7500,0.7500\n"
        "5,cat,ant,0.5000,0.2500\n"
    )
    assert (tmp_path / "per_class.csv").read_text() == (
        "class,images,top1,top5\n"
        "ant,1,100.0,100.0\n"
        '"bee, wild",2,0.0,50.0\n'
        "cat,3,33.333333,100.0\n"
        "dog,0,,\n"
    )
    assert (tmp_path / "confusions.csv").read_text() == (
        'label,predicted,images\n"bee, wild",ant,2\ncat,ant,1\ncat,"bee, wild",1\n'
    )
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(found) == ["top1", "classes", "confusions"]
    assert found["classes"][3] == {"class": "dog", "images": 0, "top1": None, "top5": None}
    assert found["confusions"][0] == {"label": "bee, wild", "predicted": "ant", "images": 2}


def test_no_mistakes_are_no_confusions() -> None:
    assert predictions.confusions(FOUND._replace(predicted=FOUND.label), CLASSES) == []


def test_files_killed_at_any_file_system_call_are_of_one_evaluation(tmp_path: Path) -> None:
    """Where there is an evaluation.json, the other files belong to it."""
    better = FOUND._replace(predicted=FOUND.label)
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        predictions.write(folder, {"top1": 33.3}, FOUND, CLASSES)
        killed = dies_at(number, lambda: predictions.write(folder, {}, better, CLASSES))  # noqa: B023
        if (folder / "evaluation.json").exists():
            old = "top1" in json.loads((folder / "evaluation.json").read_text())
            assert ('1,"bee, wild",ant' in (folder / "predictions.csv").read_text()) == old
            assert (len((folder / "confusions.csv").read_text().splitlines()) > 1) == old
        predictions.write(folder, {}, better, CLASSES)
        assert len(list(folder.iterdir())) == 4
        if not killed:
            return
    raise AssertionError("never complete")
