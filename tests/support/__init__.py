"""What tests share: real processes of ours, faults, a cluster."""

import os

# Threads of torch that wait for each other sleep. They would spin, and where more threads than cores compute, as two runs do
# beside each other, spinning threads keep those from the cores that they wait for. Set here, before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
