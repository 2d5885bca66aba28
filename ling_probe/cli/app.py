"""The application that every command registers with."""

import typer

app = typer.Typer(
    name="ling-probe",
    help="See, test and change which experts a Ling 2.0 model routes to while it reasons.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
