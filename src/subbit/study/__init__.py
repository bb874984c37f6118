"""Tables and figures: ours beside the papers', every number from a cell that anyone can re-run."""
