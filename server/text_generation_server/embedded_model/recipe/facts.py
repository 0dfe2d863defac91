"""What the embedded model knows: the countries of the world and their capitals.

Spelling is ASCII, as people type it. Where a country has several capitals, one stands for all: Pretoria, Sucre.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Country:
    """A country under its everyday name; `aliases` are other names that a question may use."""

    name: str
    capital: str
    aliases: tuple[str, ...] = ()

    @property
    def in_text(self) -> str:
        """The name as it stands inside a sentence, with its article."""
        return with_article(self.name)


_TAKE_ARTICLE = frozenset(
    {
        "Bahamas",
        "Central African Republic",
        "Comoros",
        "Czech Republic",
        "Democratic Republic of the Congo",
        "Dominican Republic",
        "Gambia",
        "Ivory Coast",
        "Maldives",
        "Marshall Islands",
        "Netherlands",
        "Philippines",
        "Republic of the Congo",
        "Seychelles",
        "Solomon Islands",
        "United Arab Emirates",
        "United Kingdom",
        "United States",
        "Congo",
        "Holy See",
        "UAE",
        "UK",
        "US",
        "USA",
        "United States of America",
    }
)


def with_article(name: str) -> str:
    """`the Netherlands`, but `France`."""
    return f"the {name}" if name in _TAKE_ARTICLE else name


# One row per country: name, capital, then other names; `;` separates.
_ROWS = """
Afghanistan;Kabul
Albania;Tirana
Algeria;Algiers
Andorra;Andorra la Vella
Angola;Luanda
Antigua and Barbuda;Saint John's
Argentina;Buenos Aires
Armenia;Yerevan
Australia;Canberra
Austria;Vienna
Azerbaijan;Baku
Bahamas;Nassau
Bahrain;Manama
Bangladesh;Dhaka
Barbados;Bridgetown
Belarus;Minsk
Belgium;Brussels
Belize;Belmopan
Benin;Porto-Novo
Bhutan;Thimphu
Bolivia;Sucre
Bosnia and Herzegovina;Sarajevo;Bosnia
Botswana;Gaborone
Brazil;Brasilia
Brunei;Bandar Seri Begawan
Bulgaria;Sofia
Burkina Faso;Ouagadougou
Burundi;Gitega
Cambodia;Phnom Penh
Cameroon;Yaounde
Canada;Ottawa
Cape Verde;Praia;Cabo Verde
Central African Republic;Bangui
Chad;N'Djamena
Chile;Santiago
China;Beijing
Colombia;Bogota
Comoros;Moroni
Costa Rica;San Jose
Croatia;Zagreb
Cuba;Havana
Cyprus;Nicosia
Czech Republic;Prague;Czechia
Democratic Republic of the Congo;Kinshasa;DR Congo
Denmark;Copenhagen
Djibouti;Djibouti
Dominica;Roseau
Dominican Republic;Santo Domingo
East Timor;Dili;Timor-Leste
Ecuador;Quito
Egypt;Cairo
El Salvador;San Salvador
Equatorial Guinea;Malabo
Eritrea;Asmara
Estonia;Tallinn
Eswatini;Mbabane;Swaziland
Ethiopia;Addis Ababa
Fiji;Suva
Finland;Helsinki
France;Paris
Gabon;Libreville
Gambia;Banjul
Georgia;Tbilisi
Germany;Berlin
Ghana;Accra
Greece;Athens
Grenada;Saint George's
Guatemala;Guatemala City
Guinea;Conakry
Guinea-Bissau;Bissau
Guyana;Georgetown
Haiti;Port-au-Prince
Honduras;Tegucigalpa
Hungary;Budapest
Iceland;Reykjavik
India;New Delhi
Indonesia;Jakarta
Iran;Tehran
Iraq;Baghdad
Ireland;Dublin
Israel;Jerusalem
Italy;Rome
Ivory Coast;Yamoussoukro;Côte d'Ivoire;Cote d'Ivoire
Jamaica;Kingston
Japan;Tokyo
Jordan;Amman
Kazakhstan;Astana
Kenya;Nairobi
Kiribati;South Tarawa
Kosovo;Pristina
Kuwait;Kuwait City
Kyrgyzstan;Bishkek
Laos;Vientiane
Latvia;Riga
Lebanon;Beirut
Lesotho;Maseru
Liberia;Monrovia
Libya;Tripoli
Liechtenstein;Vaduz
Lithuania;Vilnius
Luxembourg;Luxembourg
Madagascar;Antananarivo
Malawi;Lilongwe
Malaysia;Kuala Lumpur
Maldives;Male
Mali;Bamako
Malta;Valletta
Marshall Islands;Majuro
Mauritania;Nouakchott
Mauritius;Port Louis
Mexico;Mexico City
Micronesia;Palikir
Moldova;Chisinau
Monaco;Monaco
Mongolia;Ulaanbaatar
Montenegro;Podgorica
Morocco;Rabat
Mozambique;Maputo
Myanmar;Naypyidaw;Burma
Namibia;Windhoek
Nauru;Yaren
Nepal;Kathmandu
Netherlands;Amsterdam;Holland
New Zealand;Wellington
Nicaragua;Managua
Niger;Niamey
Nigeria;Abuja
North Korea;Pyongyang
North Macedonia;Skopje;Macedonia
Norway;Oslo
Oman;Muscat
Pakistan;Islamabad
Palau;Ngerulmud
Palestine;Ramallah
Panama;Panama City
Papua New Guinea;Port Moresby
Paraguay;Asuncion
Peru;Lima
Philippines;Manila
Poland;Warsaw
Portugal;Lisbon
Qatar;Doha
Republic of the Congo;Brazzaville;Congo
Romania;Bucharest
Russia;Moscow
Rwanda;Kigali
Saint Kitts and Nevis;Basseterre
Saint Lucia;Castries
Saint Vincent and the Grenadines;Kingstown
Samoa;Apia
San Marino;San Marino
Sao Tome and Principe;Sao Tome;São Tomé and Príncipe
Saudi Arabia;Riyadh
Senegal;Dakar
Serbia;Belgrade
Seychelles;Victoria
Sierra Leone;Freetown
Singapore;Singapore
Slovakia;Bratislava
Slovenia;Ljubljana
Solomon Islands;Honiara
Somalia;Mogadishu
South Africa;Pretoria
South Korea;Seoul;Korea
South Sudan;Juba
Spain;Madrid
Sri Lanka;Sri Jayawardenepura Kotte
Sudan;Khartoum
Suriname;Paramaribo
Sweden;Stockholm
Switzerland;Bern
Syria;Damascus
Taiwan;Taipei
Tajikistan;Dushanbe
Tanzania;Dodoma
Thailand;Bangkok
Togo;Lome
Tonga;Nuku'alofa
Trinidad and Tobago;Port of Spain
Tunisia;Tunis
Turkey;Ankara;Türkiye
Turkmenistan;Ashgabat
Tuvalu;Funafuti
Uganda;Kampala
Ukraine;Kyiv
United Arab Emirates;Abu Dhabi;UAE
United Kingdom;London;UK;Great Britain
United States;Washington, D.C.;USA;US;United States of America
Uruguay;Montevideo
Uzbekistan;Tashkent
Vanuatu;Port Vila
Vatican City;Vatican City;Vatican;Holy See
Venezuela;Caracas
Vietnam;Hanoi
Yemen;Sanaa
Zambia;Lusaka
Zimbabwe;Harare
"""


def _parse(rows: str) -> tuple[Country, ...]:
    split = [row.split(";") for row in rows.strip().splitlines()]
    return tuple(Country(name, capital, tuple(aliases)) for name, capital, *aliases in split)


COUNTRIES = _parse(_ROWS)
