"""`inferno tune` and `inferno simulate`, on a model that takes 5 ms for a pass."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from inferno.cli.main import main
from inferno.testing.processes import ROOT


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # Room for the tables.
    monkeypatch.setattr("inferno.cli.tune.out.width", 200)


def inferno(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    seconds = {str(n): 0.005 + 0.00005 * n for n in (1, 2, 4, 8, 16, 32)}
    measured = {"model": "mock", "version": 1, "device": "cpu", "executors": 1, "threads": 2}
    file = tmp_path_factory.mktemp("curves") / "mock.json"
    file.write_text(json.dumps(measured | {"seconds": seconds}))
    return file


def test_tuning_measures_and_proposes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot, save = tmp_path / "curve.svg", tmp_path / "curve.json"
    done = inferno("tune", "mock", "--seconds", "0.05", "--plot", str(plot), "--save", str(save))
    assert done.exit_code == 0, done.output
    assert "batching: {max_batch_size: 32, max_batch_delay_ms: " in done.output
    assert "<svg" in plot.read_text()
    # What was kept can be simulated, and says what the model's parameters say
    assert 0.005 <= json.loads(save.read_text())["seconds"]["1"] < 0.05
    again = inferno("simulate", "mock", "--curve", str(save), "--rate", "50", "--seconds", "2")
    assert again.exit_code == 0, again.output


def test_an_objective_that_cannot_be_met_is_a_failure() -> None:
    done = inferno("tune", "mock", "--seconds", "0.01", "--slo-p95-ms", "1", "--rate", "100")
    assert done.exit_code == 1
    assert "The nearest is above" in done.output


def test_without_matplotlib_a_plot_is_refused_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = inferno("tune", "mock", "--seconds", "0.01", "--plot", str(tmp_path / "x.svg"))
    assert done.exit_code == 1
    assert "pip install matplotlib" in done.output


def rows(result: Result) -> list[list[str]]:
    assert result.exit_code == 0, result.output
    return [line.split() for line in result.output.splitlines() if line.strip()[:1].isdigit()]


def test_settings_are_compared_under_the_same_arrivals(curve: Path) -> None:
    sizes = ("--size", "1", "--size", "32", "--delay-ms", "0", "--delay-ms", "10")
    arguments = ("simulate", "mock", "--curve", str(curve), "--clients", "64", *sizes)
    table = rows(inferno(*arguments))
    assert [row[:2] for row in table] == [["1", "0"], ["1", "10"], ["32", "0"], ["32", "10"]]
    alone, together = float(table[0][2]), float(table[3][2])
    assert together > 10 * alone
    # And again the same table
    assert rows(inferno(*arguments)) == table


def test_a_fixed_window_is_paid_by_a_lone_client(curve: Path) -> None:
    arguments = ("simulate", "mock", "--curve", str(curve), "--clients", "1", "--delay-ms", "10")
    [adaptive], [fixed] = rows(inferno(*arguments)), rows(inferno(*arguments, "--fixed"))
    assert float(fixed[3]) == pytest.approx(float(adaptive[3]) + 10, abs=0.2)


def test_recorded_arrivals_are_played(curve: Path, tmp_path: Path) -> None:
    recording = tmp_path / "arrivals.txt"
    recording.write_text("1000.0\n1000.5\n\n1001.0\n")
    arguments = ("simulate", "mock", "--curve", str(curve), "--arrivals", str(recording))
    [row] = rows(inferno(*arguments, "--seconds", "3"))
    assert row[2:4] == ["1", "6.6"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "expected one of --clients, --rate and --arrivals"),
        (("--rate", "5", "--clients", "5"), "expected one of"),
        (("--arrivals", "pyproject.toml"), "expected times in seconds"),
        (
            ("--rate", "5", "--curve", "pyproject.toml"),
            "expected a file from `inferno tune",
        ),
    ],
)
def test_what_cannot_be_simulated_is_explained(
    curve: Path, arguments: tuple[str, ...], reason: str
) -> None:
    done = inferno("simulate", "mock", "--curve", str(curve), *arguments)
    assert done.exit_code != 0
    assert reason in " ".join(done.output.split())


def test_the_curve_of_another_model_is_refused(curve: Path) -> None:
    done = inferno("simulate", "echo", "--curve", str(curve), "--rate", "5")
    assert done.exit_code == 1
    assert "expected echo, got mock" in done.output
