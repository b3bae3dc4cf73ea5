"""The protocol between the processes of Sparse, the MQTT client, dispatch, and configuration."""
