"""What an emitted file really is, does and costs, and the report that says so."""
