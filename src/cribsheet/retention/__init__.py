"""What a sheet has lost: probes, and the rate that loses no more than is allowed."""
