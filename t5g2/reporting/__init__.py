"""What a run shows: metrics log, TensorBoard, progress, plots and the HTML report."""
