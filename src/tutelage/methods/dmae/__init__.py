CATALOGUE = {"dmae": "procedure:DMAE", "mae": "procedure:MAE"}
