"""`decay export`: one finished trial of a study becomes a folder for Hugging Face's transformers."""

from __future__ import annotations

from pathlib import Path

from services.export.card import model_card
from services.export.finished import finished
from services.export.folder import Export, write_export
from services.study.file import Study

FOLDER = "exports"


def export_trial(study: Study, word: str, target: Path | None = None, overwrite: bool = False) -> Path:
    """Exports the trial that `word` names to `target`, by default exports/<its name> here; returns the folder.

    Raises ExportError, StudyError or CacheError, each one line; then nothing was written.
    """
    with finished(study, word) as trial:
        folder = target if target is not None else Path(FOLDER) / trial.result.name
        tokenizer = None if trial.text is None else trial.text.tokenizer
        export = Export(config=trial.config, weights=trial.weights, card=model_card(trial), tokenizer=tokenizer)
        write_export(export, folder.absolute(), overwrite)
    return folder
