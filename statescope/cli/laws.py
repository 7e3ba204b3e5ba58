"""``statescope laws``."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from statescope.cli.app import app
from statescope.cli.given import plain_errors


@app.command()
def laws(
    tables: Annotated[list[Path], typer.Argument(help="Tables of runs, from statescope sweep.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for findings and figures.")],
    far: Annotated[int, typer.Option(help="Tokens from which on positions are far beyond training.")] = 8192,
    within: Annotated[float, typer.Option(help="How much recall of recent pairs may fall.")] = 0.02,
) -> None:
    """Say from which training length on a state of a given size forgets, and which law that follows."""
    with plain_errors():
        summarise(tables, output, far, within)


def summarise(tables: list[Path], output: Path, far: int, within: float = 0.02) -> None:
    """Print which runs forget, write what follows from it, and draw it."""
    from statescope.analyses.findings import budgets, findings
    from statescope.analyses.growth import crossings, loss_growth
    from statescope.analyses.runs import read_runs
    from statescope.analyses.thresholds import learned_to_forget, thresholds
    from statescope.analyses.words import in_words

    runs = read_runs(*tables)
    said = findings(runs, far, within)
    output.mkdir(parents=True, exist_ok=True)
    for kind, some in budgets(runs):
        found = thresholds(learned_to_forget(some, within, far), size="state_size")
        typer.echo(f"\nruns that forget, of {_name(kind)}, by state and training length")
        typer.echo(f"{'N':>6}" + "".join(f"{t:>9}" for t in found["train_length"].values) + "   threshold")
        for n in found["state_size"].values:
            row = found.sel(state_size=n)
            cells = zip(row["fraction"].values, row["runs"].values, strict=True)
            shares = "".join(f"{'-' if not k else f'{f * k:.0f}/{k:.0f}':>9}" for f, k in cells)
            typer.echo(f"{n:>6}{shares}   {_between(row)}")
        grown = crossings(loss_growth(some, far), "state_size")
        typer.echo(
            f"loss far beyond over loss at the end of training; where it falls to {grown.attrs['level']:g}"
        )
        for n in grown["state_size"].values:
            row = grown.sel(state_size=n)
            typer.echo(f"{n:>6}" + "".join(f"{g:>9.3g}" for g in row["growth"].values) + f"   {_at(row)}")
    for one in said:
        typer.echo("\n" + "\n".join(in_words(one)))
    path = output / "findings.json"
    path.write_text(json.dumps(said, indent=1), encoding="utf-8")
    typer.echo(f"\nfindings: {path}")
    if find_spec("seaborn") is None:
        typer.echo("no pictures: seaborn is not installed (pip install 'statescope-ssm[plots]')")
        return
    for kind, some in budgets(runs):
        _draw(some, output, _name(kind), far, within)
    _draw_growth(runs, output, far)
    _draw_mechanism(runs, output, far)


def _name(kind: dict[str, Any]) -> str:
    return f"{kind['stream']}-b{kind['steps']}-u{kind['uniform']:g}"


def _between(row: Any) -> str:
    last, first = float(row["last_failing"]), float(row["first_passing"])
    if last == 0:
        return f"at most {first:g}" if first < float("inf") else "not known"
    return f"above {last:g}" if first == float("inf") else f"{last:g} to {first:g}"


def _at(row: Any) -> str:
    middle, low, high = (float(row[name]) for name in ("threshold", "low", "high"))
    if not 0 < middle < float("inf"):
        return "below all" if middle == 0 else "above all" if middle > 0 else "not known"
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def _draw(runs: Any, output: Path, name: str, far: int, within: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from statescope.analyses.plots.growth import passkey_length_figure
    from statescope.analyses.plots.laws import position_figure, threshold_figure

    figures = {
        "positions": position_figure(runs),
        "loss": position_figure(runs, "loss"),
        "thresholds": threshold_figure(runs, far, within),
        "thresholds-by-loss": threshold_figure(runs, far, within, criterion="loss"),
    }
    if "passkeys" in runs:
        figures["passkeys"] = passkey_length_figure(runs)
    for kind, figure in figures.items():
        _save(figure, output / f"{kind}-{name}.png")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
    typer.echo(f"picture: {path}")


def _draw_growth(runs: Any, output: Path, far: int) -> None:
    """Draw the growth of the loss of all budgets of one kind of data together."""
    from statescope.analyses.plots.growth import growth_figure
    from statescope.analyses.runs import final

    done = final(runs)
    for stream, uniform in sorted(set(zip(done["stream"].values, done["uniform"].values, strict=True))):
        alike = (done["stream"] == stream) & (done["uniform"] == uniform)
        path = output / f"growth-{stream}-u{uniform:g}.png"
        _save(growth_figure(done.isel(run=alike.values), far), path)


def _draw_mechanism(runs: Any, output: Path, far: int) -> None:
    """Draw what states learn along training, of every state size with checkpoints before the last."""
    from statescope.analyses.plots.mechanism import mechanism_figure

    followed = set(runs["name"].values[(runs["step"] < runs["steps"]).values].tolist())
    some = runs.isel(run=[name in followed for name in runs["name"].values.tolist()])
    for size in sorted(set(some["state_size"].values.tolist())):
        of_size = some.isel(run=(some["state_size"] == size).values)
        _save(mechanism_figure(of_size, far), output / f"mechanism-n{size}.png")
