"""The command line: ``statescope trace | info | passkey | demo | bench``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Look inside the recurrent state of a language model while it reads.",
)

Integers = Annotated[str | None, typer.Option(help="Integers or ranges, such as 0,3,8:12 or 127:4096:128.")]


@app.command()
def trace(
    model: Annotated[str, typer.Argument(help="A bundled checkpoint, a folder or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the record.")],
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT_OR_FILE", help="A text, a UTF-8 file, or - for standard input."),
    ] = None,
    newlines: Annotated[int | None, typer.Option(help="Instead of a text: so many line breaks.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Hub id, folder, tokenizer.json or bytes.")] = None,
    layers: Integers = None,
    heads: Integers = None,
    snapshots: Integers = None,
    probes: Integers = None,
    reach: Annotated[
        int | None, typer.Option(help="Tokens before each probe that get a share. Default: all.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per entry of /steps.")] = 1,
    segment: Annotated[int | None, typer.Option(help="Tokens of one forward pass.")] = None,
    backend: Annotated[str, typer.Option(help="auto, model, or the name of a kernel.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    train_length: Annotated[int | None, typer.Option(help="Tokens the model was trained at.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a record that is there.")] = False,
) -> None:
    """Read a text with a model and record its recurrent states."""
    with _plain_errors():
        if (text is None) == (newlines is None):
            raise ValueError("give either a text or --newlines")
        content: Any = newlines if text is None else _read(text)
        import statescope
        from statescope.experiments.newlines import newlines as trace_newlines

        reads: Any = statescope.trace if newlines is None else trace_newlines
        spans = {"layers": layers, "heads": heads, "snapshots": snapshots, "probes": probes}
        chosen = {name: _integers(name, span) for name, span in spans.items()}
        if chosen["probes"] is not None:
            chosen["probes"] = statescope.Probes(chosen["probes"], reach)
        reads(
            model,
            content,
            tokenizer=tokenizer,
            store=output,
            window=window,
            segment=segment,
            backend=backend,
            device=device,
            dtype=dtype,
            train_length=train_length,
            overwrite=overwrite,
            **chosen,
        )
        _describe(output)


@app.command()
def info(store: Annotated[Path, typer.Argument(help="A record.")]) -> None:
    """Say what a record holds."""
    with _plain_errors():
        _describe(store)


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
    tokenizer: Annotated[str | None, typer.Option(help="Hub id, folder, tokenizer.json or bytes.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the passkeys.")] = 0,
    batch: Annotated[int | None, typer.Option(help="Prompts asked at once.")] = None,
    explain: Annotated[
        Path | None, typer.Option(help="Measure states too; write here what they explain (JSON).")
    ] = None,
    train_length: Annotated[int | None, typer.Option(help="Tokens the model was trained at.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
) -> None:
    """Ask for passkeys over a grid of lengths and depths; what is answered already is not asked again."""
    with _plain_errors():
        sizes, places = sorted(set(_integers("lengths", lengths))), _numbers("depths", depths)
        text = None if haystack is None else _read_file("haystack", haystack)
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
        typer.echo(f"{name:>20} {lost:+.4f}")
    output.write_text(json.dumps(found.to_dict()), encoding="utf-8")
    typer.echo(f"explanation: {output}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for records and picture.")] = Path(
        "demo"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace records that are there.")] = False,
) -> None:
    """Trace passkeys inside and beyond the training length with the bundled checkpoints."""
    with _plain_errors():
        from statescope.experiments import demo as demonstration

        demonstration.run(output, overwrite=overwrite, say=typer.echo)


@app.command()
def bench(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Result file (JSON); the picture is put beside it.")
    ] = Path("bench.json"),
    parts: Annotated[
        str, typer.Option(help="What to measure, of accuracy, scan, forward, stream.")
    ] = "accuracy,scan,forward,stream",
    shapes: Annotated[str, typer.Option(help="Shapes whose scan is timed: 130M, 370M, 1.3B, 2.7B.")] = "370M",
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of the scan, such as 2048,65536. Default: by device.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Timed rounds of every contestant. Default: 5, on a CPU 3.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Shape or bundled checkpoint of forward and stream. Default: by device.")
    ] = "",
    forward: Annotated[
        int, typer.Option(help="Tokens of the whole model's forward. Default: by device.")
    ] = 0,
    stream: Annotated[
        str | None, typer.Option(help="Tokens of the texts traced to disk. Default: by device.")
    ] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="Folder on the disk to write records to, and remove again.")
    ] = None,
    draw: Annotated[
        list[Path] | None, typer.Option(help="Measure nothing: draw this result file (may be repeated).")
    ] = None,
) -> None:
    """Verify the kernels here, then time them beside their peers."""
    with _plain_errors():
        if draw:
            _draw_results(draw, draw[0].with_suffix(".png"))
            return
        import torch

        from statescope.experiments.bench import command
        from statescope.experiments.bench.settings import Settings

        settings = Settings.of(
            gpu=torch.cuda.is_available(),
            parts=tuple(parts.split(",")),
            shapes=tuple(shapes.split(",")),
            lengths=tuple(_integers("lengths", lengths) or ()),
            rounds=rounds,
            model=model,
            forward=forward,
            stream=tuple(_integers("stream", stream) or ()),
            scratch=scratch,
        )
        result = command.run(settings, output, typer.echo)
        typer.echo(f"\nresult: {output}")
        _draw_results([output], output.with_suffix(".png"))
        if result["failed"]:
            raise typer.Exit(1)


def _draw_results(results: list[Path], picture: Path) -> None:
    content = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    try:
        from statescope.experiments.bench import figure
    except ModuleNotFoundError as error:
        typer.echo(f"no picture: {error.name} is not installed (pip install 'statescope-ssm[plots]')")
        return
    try:
        figure.save(content, picture)
    except ValueError as error:
        typer.echo(f"no picture: {error}")
        return
    typer.echo(f"picture: {picture}")


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Show what a user can mend as one line, without a traceback, and nothing of transformers' advice."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        typer.echo("stopped; run the same command again to go on from the last commit", err=True)
        raise typer.Exit(130) from error


def _read(text: str) -> str:
    if text == "-":
        return sys.stdin.read()
    try:
        is_file = Path(text).is_file()
    except (OSError, ValueError):  # a text too long, or of characters no path has
        is_file = False
    if not is_file:
        return text
    return _read_file("text", Path(text))


def _read_file(name: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {path} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _numbers(name: str, given: str) -> list[float]:
    try:
        return [float(part) for part in given.split(",")]
    except ValueError as error:
        raise ValueError(f"{name}={given!r}; expected numbers, such as 0,0.5,1") from error


def _integers(name: str, given: str | None) -> Any:
    """Read ``0,3,8:12``: integers and ranges with Python's meaning."""
    if given is None:
        return None
    found: list[int] = []
    try:
        for part in given.split(","):
            bounds = [int(x) if x else None for x in part.split(":")]
            if len(bounds) == 1 and bounds[0] is not None:
                found.append(bounds[0])
            elif len(bounds) in (2, 3) and bounds[1] is not None:
                found.extend(range(bounds[0] or 0, bounds[1], (bounds[2:] or [1])[0] or 1))
            else:
                raise ValueError(part)
    except ValueError as error:
        raise ValueError(
            f"{name}={given!r}; expected integers or start:stop[:step], such as 0,3,8:12"
        ) from error
    return found


def _describe(store: Path) -> None:
    import statescope

    record: Any = statescope.open(store)
    a, sizes = record.attrs, record["steps"].sizes
    state = (
        "complete" if a["complete"] else f"interrupted after {a['committed']:,} tokens; trace again to go on"
    )
    files = [p for p in store.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files) / 2**20
    window, length = json.loads(a["watch"])["window"], a["train_length"] or "unknown"
    outputs = "the model's own scan" if a["outputs"] == "model" else f"the {a['backend']} kernel"
    lines = {
        "record": f"{store} ({size:.1f} MiB, {len(files)} files), {state}",
        "model": f"{a['model_id']} ({a['model_type']}, {a['dtype']}, training length {length})",
        "text": f"{sizes['sequence']} x {a['tokens']:,} tokens, mean loss {_mean_loss(record)}",
        "steps": f"{sizes['layer']} layers x {sizes['head']} heads, tokens per entry: {window}",
        "outputs": f"by {outputs}, in segments of {a['segment']:,} tokens",
        "measured": f"by the {a['backend']} kernel",
        "created": f"{a['created_at']} by statescope {a['statescope_version']}",
    }
    for group, dim in (("snapshots", "position"), ("probes", "probe")):
        if group in record:
            lines[group] = ", ".join(str(p) for p in record[group][dim].values[:12])
    if a.get("first_nonfinite"):
        lines["non-finite"] = f"first at {a['first_nonfinite']}"
    for name, line in lines.items():
        typer.echo(f"{name:12} {line}")
    _summarise(record)


def _mean_loss(record: Any) -> str:
    loss = float(record["tokens"]["loss"].mean())
    return "unknown" if loss != loss else f"{loss:.3f} nat"


def _summarise(record: Any) -> None:
    """Print the mean of every variable of /steps by layer."""
    steps = record["steps"]
    if not steps.sizes["token"]:
        return
    means = {name: steps[name].mean(("sequence", "token", "head")) for name in steps.data_vars}
    typer.echo("\nmean over tokens and heads")
    typer.echo(f"{'layer':>5} " + " ".join(f"{name:>14}" for name in means))
    for i, layer in enumerate(steps["layer"].values):
        typer.echo(f"{layer:>5} " + " ".join(f"{float(m[i]):>14.4g}" for m in means.values()))


if __name__ == "__main__":
    app()
