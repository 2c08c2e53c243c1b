"""The demo tells the truth: it trains, dies, goes on, and leaves what it announces."""

import json
import subprocess
import sys
from pathlib import Path


def test_the_demo_kills_resumes_samples_and_evaluates(tmp_path: Path) -> None:
    demo = [
        sys.executable, "-m", "launch", "demo", "--folder", str(tmp_path / "demo"),
        "train.steps=40", "checkpoint.every=16", "sample.every=20", "train.batch=16",
    ]  # fmt: skip
    result = subprocess.run(demo, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "demo" / "digits"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))
    assert f"resuming {run} from step 16" in result.stderr
    for name in ("samples/final.png", "samples/training.png", "loss.png", "evaluation.json"):
        assert (run / name).stat().st_size > 0
        assert name == "evaluation.json" or name in result.stdout
    assert "mlflow ui --backend-store-uri" in result.stdout
