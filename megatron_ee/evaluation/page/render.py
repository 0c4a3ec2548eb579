"""Makes one self-contained HTML file of the blocks. Whatever comes from a file is escaped."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_ee import __version__
from megatron_ee.checkpoint.atomic import write_file
from megatron_ee.checkpoint.ownership import MADE_BY
from megatron_ee.errors import printable
from megatron_ee.evaluation.page.answers_section import answers_section
from megatron_ee.evaluation.page.appendix_section import files_section, words_section
from megatron_ee.evaluation.page.blocks import Page
from megatron_ee.evaluation.page.cost_section import cost_section
from megatron_ee.evaluation.page.examples_section import examples_section
from megatron_ee.evaluation.page.groups_section import groups_section
from megatron_ee.evaluation.page.layers_section import layers_section
from megatron_ee.evaluation.page.material import Material
from megatron_ee.evaluation.page.overview_section import overview_section
from megatron_ee.evaluation.page.risk_section import certificates_section, drift_section
from megatron_ee.evaluation.page.tuned_section import name_of, tuned_section
from megatron_ee.evaluation.page.watch_section import watch_section
from megatron_ee.evaluation.tinted import visible

TEMPLATE = "report.html.jinja"


def make_page(material: Material, title: str | None = None) -> Page:
    """The page. ``title`` replaces its own."""
    t = material.t
    sections = [
        overview_section(material),
        watch_section(material),
        tuned_section(material),
        cost_section(material),
        answers_section(material),
        layers_section(material),
        certificates_section(material),
        drift_section(material),
        groups_section(material),
        examples_section(material),
        words_section(material),
        files_section(material),
    ]
    model = name_of(material.model) if material.model else ""
    own = t("page.title", model=model) if model else t("page.title_plain")
    return Page(
        title=printable(title) if title else own,
        subtitle=t("page.subtitle", version=__version__),
        sections=[section for section in sections if section is not None],
        words=t,
        language=t.code,
    )


def html(page: Page) -> str:
    """The HTML of a page."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    environment.filters["trusted"] = Markup  # of figures, which this package draws
    return environment.get_template(TEMPLATE).render(page=page, t=page.words, generator=MADE_BY)


def write_page(page: Page, path: Path) -> None:
    """Write a page.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_file(path, html(page).encode("utf-8", "backslashreplace"))
