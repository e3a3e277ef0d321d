"""Images, histograms and texts: as values, as files that others read, through resumes, and where they have no place."""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
import pytest
import torch

import purestep as ps
from purestep import loggers
from purestep.errors import MetricError
from purestep.loggers import Histogram, Image, Text

pillow = pytest.importorskip("PIL.Image")
TX = ps.optim.sgd(0.1)


def pixels(*shape):
    return ps.random.normal(ps.random.key(len(shape)), shape)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_an_image_is_a_png_that_others_read(channels):
    given = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    read = np.asarray(pillow.open(io.BytesIO(Image(given).content()))).reshape(5, 7, channels)
    np.testing.assert_array_equal(read, given.permute(1, 2, 0).numpy())


def test_numbers_with_a_point_are_scaled_and_cut_off():
    given = torch.tensor([[-1.0, 0.0, 0.5], [1.0, 2.0, float("nan")]])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert Image(given.to(dtype)).pixels[..., 0].tolist() == [[0, 0, 128], [255, 255, 0]]
    assert Image(np.array([[-3, 300, 7]])).pixels[..., 0].tolist() == [[0, 255, 7]]


def test_several_images_are_a_grid():
    given = torch.full((5, 3, 2, 4), 200, dtype=torch.uint8)
    shown = Image(given).pixels
    assert shown.shape == (2 * 3 - 1, 3 * 5 - 1, 3)
    assert (shown[:, :, 0] == 200).sum() == given[:, 0].numel()
    assert (shown[3:, 10:] == 0).all()  # the sixth place is empty


def test_they_copy_what_they_are_made_of():
    given = torch.zeros(2, 2, dtype=torch.uint8)
    image = Image(given)
    given += 9
    assert image.pixels.sum() == 0


@pytest.mark.parametrize("given", [torch.ones(3), torch.ones(5, 2, 2), torch.ones(0, 3), 1j, "x", None, [[1], [2, 3]]])
def test_what_is_no_image_is_refused(given):
    with pytest.raises(MetricError, match="Image"):
        Image(given)


def test_a_histogram_counts_as_numpy_does():
    given = torch.cat([pixels(1000), torch.tensor([float("nan"), float("inf")])])
    found = Histogram(given, bins=7)
    counts, edges = np.histogram(given[:-2].double().numpy(), 7)
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_array_equal(found.edges, edges)
    assert found.not_finite == 2
    assert found.total == pytest.approx(float(given[:-2].double().sum()))
    with np.load(io.BytesIO(found.content())) as file:
        np.testing.assert_array_equal(file["counts"], counts)
    assert Histogram(torch.tensor([])).counts.sum() == 0
    with pytest.raises(MetricError, match="a Histogram is made of real numbers"):
        Histogram(torch.ones(2, device="meta"))


ROW = {
    "samples/a b": Image(torch.ones(2, 3)),
    "../w": Histogram(torch.tensor([0.0, 1.0, 1.0]), bins=2),
    "text": Text("to be <or>\nnot"),
    "loss": 0.5,
}


def test_files_of_a_run_directory(tmp_path):
    sink = loggers.csv().open(tmp_path)
    for step in (1, 2, 2, 4):
        sink.log(step, ROW)
    sink.close()
    found = loggers.read_media(tmp_path)
    assert {name: list(files) for name, files in found.items()} == {name: [1, 2, 4] for name in list(ROW)[:3]}
    assert found["text"][4].read_text() == ROW["text"].text
    assert found["samples/a b"][1].read_bytes() == ROW["samples/a b"].content()
    assert all(path.is_relative_to(tmp_path / "media") for files in found.values() for path in files.values())
    assert loggers.read_csv(tmp_path) == {"step": [1, 2, 4], "loss": [0.5] * 3}
    loggers.csv().open(tmp_path, resume_step=2).close()
    assert [list(files) for files in loggers.read_media(tmp_path).values()] == [[1, 2]] * 3
    loggers.csv().open(tmp_path).close()
    assert loggers.read_media(tmp_path) == {}


def test_tensorboard_shows_them(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    sink = loggers.tensorboard().open(tmp_path)
    sink.log(1, ROW)
    sink.log(2, ROW)
    sink.close()
    sink = loggers.tensorboard().open(tmp_path, resume_step=1)
    sink.log(2, ROW)
    sink.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    images = events.Images("samples/a b")
    assert [event.step for event in images] == [1, 2]  # what a resume logs again is there once
    assert images[0].encoded_image_string == ROW["samples/a b"].content()
    histogram = events.Histograms("../w")
    assert [event.step for event in histogram] == [1, 2]
    assert list(histogram[0].histogram_value.bucket) == [1.0, 2.0]
    (text, *_) = events.Tensors("text/text_summary")
    assert text.tensor_proto.string_val[0].decode() == ROW["text"].text


def test_wandb_gets_its_own_kinds(fake_wandb, tmp_path):
    sink = loggers.wandb().open(tmp_path)
    sink.log(3, ROW)
    sink.close()
    history = fake_wandb.histories[json.loads((tmp_path / "wandb.json").read_text())["id"]]
    found = {name: value for entry in history for name, value in entry.items()}
    assert found["samples/a b"][0] == "Image"
    assert found["samples/a b"][1][0].shape == (2, 3)
    np.testing.assert_array_equal(found["../w"][2]["np_histogram"][0], [1, 2])
    assert found["text"] == ("Html", ("<pre>to be &lt;or&gt;\nnot</pre>",), {})
    assert all(entry["step"] == 3 for entry in history)


def test_a_logger_without_a_place_says_so_once(fake_mlflow, tmp_path):
    sink = loggers.mlflow().open(tmp_path)
    with pytest.warns(loggers.SkippedMediaWarning, match="'samples/a b' is left out of MLflowSink, which has no place"):
        sink.log(1, ROW)
    sink.log(2, ROW)  # warnings are errors here
    (run,) = fake_mlflow.runs.values()
    assert [(m.key, m.step) for m in run.data.metrics] == [("loss", 1), ("loss", 2)]


def test_a_run_logs_them_and_a_resume_does_not_double_them(tmp_path):
    def look(state):
        weight = state.params["weight"]
        return {"weight": Histogram(weight), "picture": Image(weight), "largest": float(weight.max())}

    def train(until, run_dir, observing=True, resume="auto"):
        state = ps.init(lambda: torch.nn.Linear(3, 2), TX, seed=3)
        data = ps.data.batches({"x": pixels(36, 3)}, 6, seed=2)
        step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), TX)
        callbacks = [ps.callbacks.snapshots(every=ps.every.steps(3), keep=ps.snapshot.all_())]
        callbacks += [ps.callbacks.observe(look, every=ps.every.steps(2))] if observing else []
        return ps.fit(step, state, data, until=until, run_dir=run_dir, callbacks=callbacks, resume=resume)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(ps.steps(5), tmp_path / "a")
        # The run goes back to its third batch, as after a kill, and logs the fourth again.
        resumed = train(ps.steps(8), tmp_path / "a", resume=3)
        straight = train(ps.steps(8), tmp_path / "b", observing=False)
    assert ps.digest(resumed.state) == ps.digest(straight.state)
    run = ps.open(tmp_path / "a")
    assert {name: list(files) for name, files in run.media.items()} == {"picture": [2, 4, 6, 8], "weight": [2, 4, 6, 8]}
    assert "media picture" in str(run)
    assert [step for step, value in zip(run.metrics["step"], run.metrics["largest"], strict=True) if value] == [
        2,
        4,
        6,
        8,
    ]
    assert run.media["picture"][8].read_bytes() == Image(resumed.state.params["weight"]).content()
