CATALOGUE = {"wa": "procedure:WA"}
