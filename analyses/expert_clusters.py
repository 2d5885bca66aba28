"""Whether the experts of a checkpoint fall into kinds: by what they prefer, their company, or their weights.

    python analyses/expert_clusters.py RUN [--json] [--rows N]

Believe the clusters where `kinds` is true: `mean_silhouette` above `silhouette_floor` (one cloud of the same spread) and a
quarter, and `stability` above a half. Compare views by `cluster_agreement.py`.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("expert_clusters"))
