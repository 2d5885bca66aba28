"""Tables and figures of a run as one page that can be mailed, beside Markdown, JSON and tables.

    report.html   everything on one page; works without a network
    report.md     the same words without the figures
    report.json   the same as data, as `REPORT_SCHEMA` says
    report.pdf    the page on paper, where asked
    tables/       every table as CSV, JSON or Parquet

The same run and seed give the same bytes.
"""

from ling_probe.report.headline import headline
from ling_probe.report.pdf import write_pdf
from ling_probe.report.schema import REPORT_SCHEMA
from ling_probe.report.sections import Depth
from ling_probe.report.tables import TableKind
from ling_probe.report.writer import write_comparison, write_report

__all__ = ["REPORT_SCHEMA", "Depth", "TableKind", "headline", "write_comparison", "write_pdf", "write_report"]
