"""The commands: what each does is its module's ``main``, whatever it was started by."""

COMMANDS = {
    "train-sd": "moa_diffusion.train_sd",
    "train-lm": "moa_diffusion.train_lm",
    "evaluate": "moa_diffusion.commands.evaluate",
    "export": "moa_diffusion.commands.export",
    "calibrate": "moa_diffusion.commands.calibrate",
    "compare": "moa_diffusion.commands.compare",
    "plan": "moa_diffusion.commands.plan",
    "rewards": "moa_diffusion.commands.heads",
    "demo": "moa_diffusion.commands.demo",
    "recipes": "moa_diffusion.commands.recipes",
}  # by name, in the order of use; each module's docstring begins with what the command does

__all__ = ["COMMANDS"]
