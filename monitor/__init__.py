"""What happened: live views, records, figures."""
