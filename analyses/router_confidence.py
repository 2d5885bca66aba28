"""How sure the router is, by layer, family and kind of step.

    python analyses/router_confidence.py RUN [--json] [--rows N]

Needs a run captured with `--keep logits`. `beyond_words` is what a kind of step has over the same words elsewhere.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("router_confidence"))
