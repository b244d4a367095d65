"""Many students of one teacher, drawn, judged and timed alike: one table and one plot."""
