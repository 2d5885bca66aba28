"""Whether the experts of a checkpoint fall into kinds by what they prefer.

    python analyses/expert_clusters.py RUN [--json] [--rows N]

Believe the clusters if `mean_silhouette` is well above `silhouette_floor` and `stability` near 1; every row says so.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("expert_clusters"))
