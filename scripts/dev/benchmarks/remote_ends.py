"""The two ends of the benchmark of the remote head: programs that import the tree they measure.

``serve`` runs the tree's ``scripts/heads.py serve`` and answers each line on its standard input
with ``cpu`` and the CPU seconds of its process so far. ``score`` reads the server's address, then
scores its images for each line, ``local`` or ``remote``, and answers with ``took``, the seconds
and the CPU seconds that it took.
"""

import runpy
import sys
import threading
import time

HEAD = "sharpness"  # costs little itself


def serve(script: str) -> None:
    """Run a reward server until it is told to end.

    Args:
        script: Path of ``scripts/heads.py``.
    """

    def answer() -> None:
        for _ in sys.stdin:
            print("cpu", time.process_time(), flush=True)

    threading.Thread(target=answer, daemon=True).start()
    sys.argv = [script, "serve", "--heads", HEAD, "--port", "0"]
    runpy.run_path(script, run_name="__main__")


def score(images: int, side: int) -> None:
    """Score the same images again and again.

    Args:
        images: Number of images.
        side: Their side in pixels.
    """
    import torch

    from rewards import RewardBatch, create

    torch.set_num_threads(1)
    noise = torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2)  # PNG packs it, in part
    batch = RewardBatch(prompts=["noise"] * images, images=smooth)
    url = sys.stdin.readline().strip()
    heads = {"local": create(HEAD), "remote": create("remote", url=url, remote_name=HEAD)}
    for head in heads.values():
        head(batch)  # warms up
    print("ready", flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        heads[line.strip()](batch)
        print("took", time.perf_counter() - wall, time.process_time() - cpu, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        score(int(sys.argv[2]), int(sys.argv[3]))
