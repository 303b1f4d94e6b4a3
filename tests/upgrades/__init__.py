"""From one release to the next: what the first one wrote, and it beside today's."""
