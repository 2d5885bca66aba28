"""What report.json holds, as a JSON Schema."""

import json
from importlib import resources
from typing import Any

REPORT_SCHEMA: dict[str, Any] = json.loads(
    (resources.files("ling_probe") / "schemas" / "report.schema.json").read_text("utf-8")
)
