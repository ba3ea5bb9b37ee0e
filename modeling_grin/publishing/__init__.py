"""Model cards and the Hub."""

TO_FILL_IN = "**TO FILL IN:**"  # marks places of a card for a person
