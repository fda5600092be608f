"""Hardware targets: schema, loading, measured latency tables."""
