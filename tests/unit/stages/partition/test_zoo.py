"""A sample of the zoo: each network computes the same in parts, or is refused with a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.environment.checkout import ROOT

# Small networks of different kinds: a large one takes minutes.
SAMPLE = [
    "transformers:*",  # ten
    *("torchvision:alexnet", "torchvision:convnext_tiny", "torchvision:efficientnet_b0", "torchvision:googlenet"),
    *("torchvision:mobilenet_v3_small", "torchvision:regnet_y_400mf", "torchvision:resnet18"),
    *("torchvision:shufflenet_v2_x0_5", "torchvision:squeezenet1_1", "torchvision:swin_t"),
    *("timm:vit_tiny_patch16_224", "timm:mobileone_s1", "timm:poolformerv2_s12", "timm:cait_xxs24_224"),
    *("timm:convit_tiny", "timm:crossvit_tiny_240", "timm:cs3darknet_focus_s", "timm:densenet121", "timm:dla46x_c"),
    *("timm:edgenext_xx_small", "timm:efficientformerv2_s0", "timm:efficientvit_b0", "timm:fasternet_t0"),
    *("timm:fastvit_t8", "timm:gcvit_xxtiny", "timm:ghostnet_050", "timm:gmlp_ti16_224", "timm:levit_128s"),
    *("timm:mobilevit_xxs", "timm:resnet10t"),
]
SIZE = 40


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sample_of_zoo_is_accepted_and_equal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.zoo", "--json", "--output", str(tmp_path / "zoo.jsonl")]
    run = subprocess.run([*command, "--only", *SAMPLE], cwd=ROOT, capture_output=True, text=True, check=True)
    results = json.loads(run.stdout.splitlines()[-1])["rows"]
    assert len(results) == SIZE
    assert [result for result in results if result["outcome"] in ("different", "failed")] == []
    assert Counter(result["outcome"] for result in results)["refused"] <= SIZE // 10, run.stdout
