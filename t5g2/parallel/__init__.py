"""The device mesh, the logical-axis rules and multi-host start-up."""
