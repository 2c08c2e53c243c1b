"""MLflow beside the training, never in its way."""

from trainer.tracking.outbox import forget
from trainer.tracking.tracker import Silent, Tracker, check_address, open_command, start

__all__ = ["Silent", "Tracker", "check_address", "forget", "open_command", "start"]
