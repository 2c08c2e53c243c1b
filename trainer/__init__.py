"""The loop that joins the rooms: recipe, step, checkpoints, tracking, sampling, evaluation."""
