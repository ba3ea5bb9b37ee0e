"""Model cards and the Hub."""

TO_FILL_IN = "**TO FILL IN:**"  # in a card, where a person has to say something
