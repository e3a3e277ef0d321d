"""Samples that `on_bad_sample="skip"` leaves out are counted in the log, whatever happens to the run."""

import pytest

import purestep as ps
from purestep.loggers.csv import read_csv


class Holed:
    """A table of which some rows cannot be read."""

    def __init__(self, table, bad):
        self.table, self.bad = table, bad

    def __len__(self):
        return len(self.table["x"])

    def __getitem__(self, i):
        if i in self.bad:
            raise OSError(f"row {i} is damaged")
        return {name: column[i] for name, column in self.table.items()}


def holed(job, workers=0):
    data = ps.data.batches(
        Holed(job.table(37, 0), (3, 4, 11, 30)), 8, seed=3, drop_last=False, num_workers=workers, on_bad_sample="skip"
    )
    return job(data=lambda: data)


@pytest.mark.filterwarnings("ignore::purestep.data.BadSampleWarning")
def test_samples_that_are_left_out_are_counted_in_the_log(job, tmp_path):
    result = ps.fit(**holed(job), until=ps.epochs(2), run_dir=tmp_path)
    rows = read_csv(tmp_path)
    logged = [n for n in rows["train/skipped_samples"] if n is not None]
    assert [n for n in rows["train/skipped_samples_epoch"] if n is not None] == [4, 4]
    assert 0 < sum(logged) <= 8  # those since the last row of the log are in none
    assert result.metrics["train/skipped_samples_epoch"] == 4
    again = ps.fit(**holed(job, workers=2), until=ps.epochs(2), run_dir=tmp_path / "workers")
    assert again.metrics == result.metrics
    assert read_csv(tmp_path / "workers") == rows


@pytest.mark.filterwarnings("ignore::purestep.data.BadSampleWarning")
def test_counted_samples_resume_exactly(job):
    ps.testing.check_resume(lambda: holed(job), batches=9, at=(2, 4, 7))
