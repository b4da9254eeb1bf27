"""Make differentially private synthetic images. Flags → one call.

    dpp-jax --config=mnist_28:1 --workdir=runs/mnist --stage=plan    what a run would spend; reads no image
    dpp-jax --config=mnist_28:1 --workdir=runs/mnist                 every stage that is not done yet
    dpp-jax --workdir=runs/mnist --stage=status                      how far it is

The number after the colon is ε. A setting is changed by --config.finetune.epochs=20; `configs/default.py`
lists them all. `python -m dpp_jax.main` in a checkout does the same as `dpp-jax`.
"""

from dpp_jax.training import preemption  # imports nothing: a Ctrl-C is answered from the start


def entry_point():
    """Run the console script `dpp-jax`."""
    preemption.leave_at_once()  # the imports take seconds
    from dpp_jax import command_line

    command_line.run(main, help_text=__doc__)


def main(argv):
    del argv
    from dpp_jax import command_line

    with command_line.errors_in_one_line():
        # Late: a mistake on the command line is told at once.
        command_line.start_jax()
        if command_line.STAGE.value == 'compose':
            from dpp_jax.run import composition

            print(composition.text(command_line.WITH.value))
            return
        if command_line.STAGE.value == 'status':
            from dpp_jax import status

            found = status.read(command_line.workdir(), command_line.private())
            print(status.as_json(found) if command_line.JSON.value else status.text(found))
            return
        from dpp_jax import pipeline

        pipeline.run(
            command_line.CONFIG.value,
            command_line.workdir(),
            command_line.STAGE.value,
            private=command_line.private(),
        )
        command_line.leave()


if __name__ == '__main__':
    entry_point()
