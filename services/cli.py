"""The command `decay`: every use of the service, each a few lines over the module that does it.

Exit codes: 0 complete, 1 failed, 2 refused (bad input, one line, nothing written), 3 incomplete (run again to go on).
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

LOG_WIDTH = 160
app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=(__doc__ or "").splitlines()[0]
)

StudyFile = Annotated[Path, typer.Argument(help="study file (YAML), such as tune_spaces/smoke.yaml")]
StorageOption = Annotated[str | None, typer.Option("--storage", help="folder or URI in place of the study file's own")]
FormatOption = Annotated[Literal["table", "csv"], typer.Option("--format", help="for a person, or for a program")]
AddressOption = Annotated[str | None, typer.Option("--address", help="Ray cluster; default RAY_ADDRESS or this machine")]

DriftOption = Annotated[
    bool, typer.Option("--accept-drift", help="go on although data, tokenizer or code have changed; it is written down")
]
RetryOption = Annotated[bool, typer.Option("--retry-quarantined", help="give quarantined trials another chance")]


@app.command()
def plan(
    study_file: StudyFile,
    storage: StorageOption = None,
    gpu: Annotated[str | None, typer.Option(help="accelerator to plan for, such as H100 or A100-80GB")] = None,
    price: Annotated[float | None, typer.Option(help="price of one GPU (or worker) for an hour")] = None,
    mfu: Annotated[float | None, typer.Option(help="share of the GPU's peak to assume where nothing is measured")] = None,
    form: Annotated[str, typer.Option("--format", help="table, csv or json: one row per cell, refused ones too")] = "table",
) -> None:
    """Show the trials, their parameters and cost, and every refused cell with its reason. Writes nothing."""
    from services.study.file import read_study
    from services.study.forecast import asked_for, forecast
    from services.study.plan import make_plan
    from services.study.plan_rows import as_text, check_format
    from services.study.show_plan import show_plan

    check_format(form)
    asked, study = asked_for(gpu, price, mfu), read_study(study_file, storage)
    if form == "table":
        show_plan(study, _console(), asked)
    else:
        typer.echo(as_text(forecast(make_plan(study), asked), form), nl=False)


@app.command("diff")
def diff_command(
    a: Annotated[str, typer.Argument(help="study file, study folder, or folder:trial (name or id)")],
    b: Annotated[str, typer.Argument(help="what to compare it with, of the same kind")],
    exit_code: Annotated[bool, typer.Option("--exit-code", help="end with 1 where something differs")] = False,
) -> None:
    """Show what differs between two studies or two trials: design, recipe, data, code of the mechanism, results."""
    from services.study.diff import diff

    if diff(a, b, _console()) and exit_code:
        raise typer.Exit(1)


@app.command()
def run(
    study_file: StudyFile,
    storage: StorageOption = None,
    address: AddressOption = None,
    accept_drift: DriftOption = False,
    retry_quarantined: RetryOption = False,
) -> None:
    """Run what is missing of a study; running again resumes, and a finished study runs nothing."""
    from services.schedule.driver import run_study
    from services.schedule.run import Options, to_stderr
    from services.study.file import read_study

    study = read_study(study_file, storage)
    options = Options(address=address, say=to_stderr, accept_drift=accept_drift, retry_quarantined=retry_quarantined)
    ended = run_study(study, options)
    _report(study)
    raise typer.Exit(int(ended))


@app.command()
def resume(
    study_file: StudyFile,
    storage: StorageOption = None,
    address: AddressOption = None,
    accept_drift: DriftOption = False,
    retry_quarantined: RetryOption = False,
) -> None:
    """Resume a study that was started before: `run`, but refused when there is nothing to resume."""
    from services.schedule.places import study_storage
    from services.study.file import StudyError, read_study
    from services.study.manifest import read_manifest

    study = read_study(study_file, storage)
    if read_manifest(study_storage(study)) is None:
        raise StudyError(f"study {study.name!r} has not started in {study.storage}; start it with decay run")
    run(study_file, storage, address, accept_drift, retry_quarantined)


@app.command()
def status(study_file: StudyFile, storage: StorageOption = None) -> None:
    """Show where every trial of a study stands."""
    from services.schedule.places import study_storage
    from services.study.file import read_study
    from services.study.show import show_status

    study = read_study(study_file, storage)
    show_status(study, study_storage(study), _console())


@app.command()
def report(study_file: StudyFile, storage: StorageOption = None) -> None:
    """Write the report of what is finished (Markdown, PNG, HTML), print its table and log it to MLflow."""
    from services.study.file import read_study

    _report(read_study(study_file, storage))


@app.command()
def params(
    study_files: Annotated[
        list[Path] | None, typer.Argument(help="study files; none: every run of the paper", show_default=False)
    ] = None,
    format: FormatOption = "table",
) -> None:
    """Count the parameters of every run of the paper, or of every trial of study files, on the model that trains."""
    from services.study.file import read_study
    from services.study.parameter_counts import PAPER_HEADER, STUDY_HEADER, paper_counts, study_counts

    if study_files:
        _print_rows(STUDY_HEADER, study_counts(read_study(path) for path in study_files), format)
    else:
        _print_rows(PAPER_HEADER, paper_counts(), format)


@app.command()
def claims(
    study_file: Annotated[Path | None, typer.Argument(help="a study with finished trials", show_default=False)] = None,
    published: Annotated[bool, typer.Option("--published", help="ask the rows that the paper prints")] = False,
    storage: StorageOption = None,
) -> None:
    """Say which of the paper's claims hold, fail or cannot be tested, by its own rows or by a study's results."""
    from services.report.claims import evaluate, measured_in, measured_in_paper
    from services.report.claims_page import claim_lines
    from services.study.file import StudyError

    if published == (study_file is not None):
        raise StudyError("decay claims takes a study file, or --published for the paper's own rows; give one of them")
    if study_file is None:
        measured = measured_in_paper()
    else:
        from services.schedule.reporting import study_results
        from services.study.file import read_study

        measured = measured_in(study_results(read_study(study_file, storage)))
    for line in claim_lines(evaluate(measured)):
        typer.echo(line)


@app.command()
def submit(
    study_file: StudyFile,
    storage: StorageOption = None,
    address: Annotated[
        str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="Ray's dashboard address")
    ] = "http://127.0.0.1:8265",
    wait: Annotated[bool, typer.Option(help="follow the log and end with the job's exit code")] = True,
    accept_drift: DriftOption = False,
    retry_quarantined: RetryOption = False,
) -> None:
    """Submit a study as a Ray job: this folder travels, the driver runs on the cluster."""
    from services.schedule.submit import submit_study

    asked = {"--accept-drift": accept_drift, "--retry-quarantined": retry_quarantined}
    options = [name for name, wanted in asked.items() if wanted]
    raise typer.Exit(submit_study(study_file, storage, address, wait, sys.stderr, options))


@app.command()
def clean(
    study_file: StudyFile,
    storage: StorageOption = None,
    quota: Annotated[str | None, typer.Option(help="keep at most this much of checkpoints, such as 20GiB")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, remove nothing")] = False,
) -> None:
    """Remove checkpoints of finished trials (their weights and results stay), then the oldest until a quota is met."""
    from services.schedule.places import study_storage
    from services.study.clean import clean_checkpoints
    from services.study.file import read_study

    study = read_study(study_file, storage)
    for line in clean_checkpoints(study_storage(study), quota, dry_run):
        typer.echo(line)


@app.command()
def export(
    study_file: StudyFile,
    trial: Annotated[str, typer.Argument(help="name of a finished trial, or the beginning of its id")],
    to: Annotated[Path | None, typer.Option(help="folder to write; default exports/<trial>", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export")] = False,
    storage: StorageOption = None,
) -> None:
    """Write a finished trial as a folder that Hugging Face's transformers loads and generates with, without this project."""
    from services.export.export_trial import export_trial
    from services.study.file import read_study

    typer.echo(export_trial(read_study(study_file, storage), trial, to, overwrite))


@app.command()
def doctor(
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; default: this machine's GPU if any")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16, fp32 or fp64; default bf16 and fp32")] = None,
    granularity: Annotated[str | None, typer.Option(help="scalar or vector; default both")] = None,
    transition: Annotated[str, typer.Option(help="diagonal, or delta for the delta rule")] = "diagonal",
    heads: Annotated[int, typer.Option(help="heads")] = 16,
    head_dim: Annotated[int, typer.Option(help="width of a head's keys and values")] = 64,
    key_dim: Annotated[int | None, typer.Option(help="width of keys where it differs", show_default=False)] = None,
    value_dim: Annotated[int | None, typer.Option(help="width of values where it differs", show_default=False)] = None,
    batch: Annotated[int, typer.Option(help="sequences")] = 32,
    seq_len: Annotated[int, typer.Option(help="tokens of a sequence")] = 2048,
) -> None:
    """Show which kernel this machine runs for a device, a dtype and a shape, and why. Computes nothing."""
    from services.study.doctor import Question, answers, machine, title

    question = Question(
        device=device, dtype=dtype, granularity=granularity, transition=transition, batch=batch, seq_len=seq_len, heads=heads,
        key_dim=head_dim if key_dim is None else key_dim, value_dim=head_dim if value_dim is None else value_dim,
    )  # fmt: skip
    found = answers(question)
    for line in [*machine(), "", title(question)]:
        typer.echo(line)
    for answer in found:
        typer.echo(f"  {answer.granularity} {answer.dtype}: {answer.kernel} ({answer.reason})")
        if answer.configuration:
            typer.echo(f"    configuration from {answer.origin}: {answer.configuration}")


@app.command()
def demo(storage: Annotated[str, typer.Option("--storage", help="where to keep the demo's files")] = "runs") -> None:
    """Train the four trials of tune_spaces/smoke.yaml on this machine and show what came out."""
    from services.schedule.driver import run_study
    from services.schedule.run import Options, to_stderr
    from services.study.file import read_study
    from services.study.show_plan import show_plan

    path = Path(__file__).parents[1] / "tune_spaces" / "smoke.yaml"
    study = read_study(path, str(Path(storage).absolute()))
    show_plan(study, _console(stderr=True))
    ended = run_study(study, Options(say=to_stderr))
    _report(study)
    raise typer.Exit(int(ended))


def _console(stderr: bool = False) -> Console:
    """A terminal's own width, or wide enough for whole tables in a log."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else LOG_WIDTH)


def _print_rows(header: Sequence[str], rows: Iterable[Sequence[str]], format: str) -> None:
    import csv

    from rich.table import Table

    if format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([header, *rows])
        return
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def _report(study: object) -> None:
    from services.schedule.reporting import report_study
    from services.study.file import Study

    assert isinstance(study, Study)
    report_study(study, _console())


def main() -> None:
    """Entry point of `decay` and of `python -m services.cli`: refusals are one line and exit code 2."""
    from services.study.secrets import WithoutPasswords, without_password

    handler = logging.StreamHandler()
    handler.setFormatter(WithoutPasswords("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for noisy in ("alembic", "mlflow", "ray", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="ray|mlflow|deepspeed|pydantic")
    try:
        app()
    except ValueError as refusal:  # StudyError, LeaseHeld, TrackingError, CacheError, StorageError ... are ValueErrors
        if not type(refusal).__module__.startswith(("services.", "decay_core.")):
            raise
        typer.echo(f"decay: {without_password(str(refusal))}", err=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        typer.echo("decay: interrupted; run again to go on", err=True)
        raise SystemExit(3) from None


if __name__ == "__main__":
    main()
