"""``statescope passkey``."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from statescope.cli.app import app
from statescope.cli.given import (
    Device,
    Dtype,
    Tokenizer,
    TrainLength,
    integers,
    numbers,
    plain_errors,
    read_file,
)


@app.command()
def passkey(
    model: Annotated[str, typer.Argument(help="A bundled checkpoint, a folder or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File of answers (JSON lines); continued.")],
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "512,1024,2048",
    depths: Annotated[str, typer.Option(help="The needle: 0 (start) to 1 (end).")] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, typer.Option(help="Prompts of each length and depth.")] = 32,
    haystack: Annotated[
        Path | None, typer.Option(help="UTF-8 text to hide passkeys in. Default: the paper's filler.")
    ] = None,
    tokenizer: Tokenizer = None,
    seed: Annotated[int, typer.Option(help="Draws the passkeys.")] = 0,
    batch: Annotated[int | None, typer.Option(help="Prompts asked at once.")] = None,
    explain: Annotated[
        Path | None, typer.Option(help="Measure states too; write here what they explain (JSON).")
    ] = None,
    train_length: TrainLength = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Ask for passkeys over a grid of lengths and depths; what is answered already is not asked again."""
    with plain_errors():
        sizes, places = sorted(set(integers("lengths", lengths))), numbers("depths", depths)
        text = None if haystack is None else read_file("haystack", haystack)
        if explain is not None and find_spec("sklearn") is None:
            raise ValueError("explain needs scikit-learn: pip install 'statescope-ssm[plots]'")
        import statescope
        from statescope.analyses.passkey import recall_length
        from statescope.experiments.failure import NeedleStates
        from statescope.experiments.passkey import passkey as ask

        settings: dict[str, Any] = {"tokenizer": tokenizer, "store": output, "seed": seed, "batch": batch}
        settings |= {"haystack": text, "observe": None if explain is None else NeedleStates(train_length)}
        live = statescope.load(model, device=device, dtype=dtype)
        for size in sizes:
            right = ask(live, [size], places, trials, **settings)["correct"].sum("trial")
            if size == sizes[0]:
                typer.echo(f"{'tokens':>8}" + "".join(f"{f'depth {d:g}':>12}" for d in right["depth"].values))
            typer.echo(f"{size:>8}" + "".join(f"{f'{n:.0f}/{trials}':>12}" for n in right.values[0]))
        table = ask(live, sizes, places, trials, **settings)
        found = recall_length(table)
        length, low, high = (float(found[f"recall_length{end}"]) for end in ("", "_low", "_high"))
        bound = f"below {high:,.0f}" if high < float("inf") else "no upper bound"
        typer.echo(f"\nrecall length (95 % right): {length:,.0f} tokens (at least {low:,.0f}, {bound})")
        typer.echo(f"answers: {output}")
        if explain is not None:
            _explain(table, explain)


def _explain(table: Any, output: Path) -> None:
    from statescope.analyses.failure import explain_failure

    found = explain_failure(table)
    typer.echo(f"\n{found.attrs['sentence']}\n\nAUC lost where a measure is shuffled:")
    for name, lost in zip(found["measure"].values, found["importance"].values, strict=True):
        typer.echo(f"{name:>24} {lost:+.4f}")
    output.write_text(json.dumps(found.to_dict()), encoding="utf-8")
    typer.echo(f"explanation: {output}")
