"""Pages without charts, for tests of everything else: drawing the charts of one page takes seconds."""

from html import escape

from minisr.report import figures

DRAWN = {name: getattr(figures, name) for name in ("by_model", "rows", "stacked", "histogram", "calibration", "curves")}


def replace_by_titles(patch) -> None:
    for name in DRAWN:
        patch.setattr(figures, name, lambda title, *_: f'<svg aria-label="{escape(title)}"></svg>')


def restore(patch) -> None:
    """Undo replace_by_titles."""
    for name, chart in DRAWN.items():
        patch.setattr(figures, name, chart)
