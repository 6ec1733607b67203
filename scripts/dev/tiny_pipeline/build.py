"""Makes the embedded pipeline: autoencoder first, then all the rest on its latents."""

from pathlib import Path

from tiny_pipeline import flow, parallel, vae


def build(
    output: Path,
    *,
    seed: int = 0,
    vae_steps: int = 1800,
    vae_batch: int = 16,
    transformer_steps: int = 3200,
    transformer_batch: int = 64,
    processes: int = 2,
) -> None:
    """Train a pipeline and save it as ``StableDiffusion3Pipeline.from_pretrained`` expects.

    Equal arguments give the same images on the same machine and libraries; another processor may
    round differently, so bit-equal weights are not promised across machines.

    Args:
        output: Folder, made if missing. An autoencoder that lies in its ``vae`` is kept, so that
            the judges that were trained with it fit the new pipeline too.
        seed: Seed of weights, scenes and noise.
        vae_steps: Updates of the autoencoder.
        vae_batch: Images in each, over all processes.
        transformer_steps: Updates of transformer and text encoders.
        transformer_batch: Scenes in each, over all processes.
        processes: Processes of one thread each. The result depends on their number.
    """
    for name, batch in (("vae_batch", vae_batch), ("transformer_batch", transformer_batch)):
        if batch % processes:
            raise ValueError(
                f"Parameter `{name}` should be a multiple of `processes = {processes}`. "
                f"Found `{name} = {batch}`."
            )
    output.mkdir(parents=True, exist_ok=True)
    if (output / "vae" / "config.json").is_file():
        print(f"The autoencoder in {output / 'vae'} is kept.")
    else:
        parallel.run(vae.train_vae, processes, output / "vae", seed, vae_steps, vae_batch)
    parallel.run(
        flow.train_transformer, processes, output, seed, transformer_steps, transformer_batch
    )
