"""What tests share: real processes of ours, faults, a cluster."""
