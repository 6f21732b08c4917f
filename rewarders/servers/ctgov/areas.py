"""The fields of a study record that can be searched, and the search areas made of them.

Source: ClinicalTrials.gov, "Search Areas" (as of 2024-06-07) and "Study Data Structure". Names are those of the service
("piece names"). Of the weights only those of the default area are used, for all rankings. Fields that are in no area
and not listed here are unknown to this server.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What the values of a field are."""

    TEXT = "text"
    ENUM = "enum"
    DATE = "date"
    NUMBER = "number"
    AGE = "age"


@dataclass(frozen=True, slots=True)
class Field:
    """One field: the name of its piece, the path to it in a record (through lists), and the values of an enum if all
    are known here."""

    name: str
    path: str
    kind: Kind
    values: tuple[str, ...] = ()

    @property
    def column(self) -> str:
        return self.name.lower()

    @property
    def is_text(self) -> bool:
        """Whether it is searched by words; the others are searched by ranges."""
        return self.kind in (Kind.TEXT, Kind.ENUM)


@dataclass(frozen=True, slots=True)
class Area:
    """Fields searched together."""

    name: str
    fields: tuple[Field, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(field.column for field in self.fields if field.is_text)


# Module of the record: "piece name = path below the module", one line for the fields of one kind.
_TEXT = {
    "protocolSection.identificationModule": """
        NCTId=nctId NCTIdAlias=nctIdAliases Acronym=acronym BriefTitle=briefTitle OfficialTitle=officialTitle
        OrgStudyId=orgStudyIdInfo.id OrgFullName=organization.fullName SecondaryId=secondaryIdInfos.id""",
    "protocolSection.sponsorCollaboratorsModule": """
        LeadSponsorName=leadSponsor.name CollaboratorName=collaborators.name
        ResponsiblePartyInvestigatorFullName=responsibleParty.investigatorFullName
        ResponsiblePartyInvestigatorTitle=responsibleParty.investigatorTitle
        ResponsiblePartyInvestigatorAffiliation=responsibleParty.investigatorAffiliation
        ResponsiblePartyOldNameTitle=responsibleParty.oldNameTitle
        ResponsiblePartyOldOrganization=responsibleParty.oldOrganization""",
    "protocolSection.descriptionModule": "BriefSummary=briefSummary DetailedDescription=detailedDescription",
    "protocolSection.conditionsModule": "Condition=conditions Keyword=keywords",
    "protocolSection.designModule": "BioSpecDescription=bioSpec.description",
    "protocolSection.armsInterventionsModule": """
        ArmGroupLabel=armGroups.label ArmGroupDescription=armGroups.description InterventionName=interventions.name
        InterventionOtherName=interventions.otherNames InterventionDescription=interventions.description""",
    "protocolSection.outcomesModule": """
        PrimaryOutcomeMeasure=primaryOutcomes.measure PrimaryOutcomeDescription=primaryOutcomes.description
        SecondaryOutcomeMeasure=secondaryOutcomes.measure SecondaryOutcomeDescription=secondaryOutcomes.description
        OtherOutcomeMeasure=otherOutcomes.measure OtherOutcomeDescription=otherOutcomes.description""",
    "protocolSection.eligibilityModule": "EligibilityCriteria=eligibilityCriteria StudyPopulation=studyPopulation",
    "protocolSection.contactsLocationsModule": """
        OverallOfficialName=overallOfficials.name OverallOfficialAffiliation=overallOfficials.affiliation
        CentralContactName=centralContacts.name LocationFacility=locations.facility LocationCity=locations.city
        LocationState=locations.state LocationZip=locations.zip LocationCountry=locations.country
        LocationContactName=locations.contacts.name""",
    "derivedSection.conditionBrowseModule": "ConditionMeshTerm=meshes.term ConditionAncestorTerm=ancestors.term",
    "derivedSection.interventionBrowseModule": """
        InterventionMeshTerm=meshes.term InterventionAncestorTerm=ancestors.term""",
    "resultsSection.outcomeMeasuresModule": """
        OutcomeMeasureTitle=outcomeMeasures.title OutcomeMeasureDescription=outcomeMeasures.description
        OutcomeMeasurePopulationDescription=outcomeMeasures.populationDescription""",
}
_ENUM = {
    "protocolSection.statusModule": "OverallStatus=overallStatus",
    "protocolSection.sponsorCollaboratorsModule": """
        LeadSponsorClass=leadSponsor.class CollaboratorClass=collaborators.class""",
    "protocolSection.designModule": """
        StudyType=studyType Phase=phases DesignAllocation=designInfo.allocation
        DesignInterventionModel=designInfo.interventionModel DesignObservationalModel=designInfo.observationalModel
        DesignPrimaryPurpose=designInfo.primaryPurpose DesignTimePerspective=designInfo.timePerspective
        DesignMasking=designInfo.maskingInfo.masking DesignWhoMasked=designInfo.maskingInfo.whoMasked
        EnrollmentType=enrollmentInfo.type""",
    "protocolSection.armsInterventionsModule": "ArmGroupType=armGroups.type InterventionType=interventions.type",
    "protocolSection.eligibilityModule": "Sex=sex StdAge=stdAges HealthyVolunteers=healthyVolunteers",
    "protocolSection.contactsLocationsModule": """
        OverallOfficialRole=overallOfficials.role LocationStatus=locations.status""",
    "": "HasResults=hasResults",
}
_DATE = {
    "protocolSection.statusModule": """
        StudyFirstPostDate=studyFirstPostDateStruct.date StudyFirstSubmitDate=studyFirstSubmitDate
        StudyFirstSubmitQCDate=studyFirstSubmitQcDate StartDate=startDateStruct.date
        PrimaryCompletionDate=primaryCompletionDateStruct.date CompletionDate=completionDateStruct.date
        LastUpdatePostDate=lastUpdatePostDateStruct.date LastUpdateSubmitDate=lastUpdateSubmitDate
        ResultsFirstPostDate=resultsFirstPostDateStruct.date ResultsFirstSubmitDate=resultsFirstSubmitDate
        StatusVerifiedDate=statusVerifiedDate""",
}
_NUMBER = {"protocolSection.designModule": "EnrollmentCount=enrollmentInfo.count"}
_AGE = {"protocolSection.eligibilityModule": "MinimumAge=minimumAge MaximumAge=maximumAge"}

_STATUS = (
    "ACTIVE_NOT_RECRUITING COMPLETED ENROLLING_BY_INVITATION NOT_YET_RECRUITING RECRUITING SUSPENDED TERMINATED "
    "WITHDRAWN AVAILABLE NO_LONGER_AVAILABLE TEMPORARILY_NOT_AVAILABLE APPROVED_FOR_MARKETING WITHHELD UNKNOWN"
)
_ENUM_VALUES = {
    "Phase": "NA EARLY_PHASE1 PHASE1 PHASE2 PHASE3 PHASE4",
    "OverallStatus": _STATUS,
    "LocationStatus": _STATUS,
    "StudyType": "INTERVENTIONAL OBSERVATIONAL EXPANDED_ACCESS",
    "StdAge": "CHILD ADULT OLDER_ADULT",
    "Sex": "FEMALE MALE ALL",
    "HasResults": "TRUE FALSE",
}

# The default area of `query.term`: weight in a ranking by relevance, fields.
_BASIC_SEARCH = {
    1.0: "NCTId Acronym",
    0.89: "BriefTitle",
    0.85: "OfficialTitle",
    0.81: "Condition",
    0.8: "InterventionName",
    0.75: "InterventionOtherName",
    0.65: "Phase StdAge",
    0.6: "PrimaryOutcomeMeasure Keyword BriefSummary",
    0.5: "ArmGroupLabel SecondaryOutcomeMeasure",
    0.45: "InterventionDescription ArmGroupDescription",
    0.4: "PrimaryOutcomeDescription LeadSponsorName OrgStudyId SecondaryId NCTIdAlias",
    0.35: "InterventionType ArmGroupType SecondaryOutcomeDescription LocationFacility LocationStatus LocationState "
    "LocationCountry LocationCity",
    0.3: "BioSpecDescription ResponsiblePartyInvestigatorFullName ResponsiblePartyInvestigatorTitle "
    "ResponsiblePartyInvestigatorAffiliation ResponsiblePartyOldNameTitle ResponsiblePartyOldOrganization "
    "OverallOfficialAffiliation OverallOfficialRole OverallOfficialName CentralContactName ConditionMeshTerm "
    "InterventionMeshTerm DesignAllocation DesignInterventionModel DesignMasking DesignWhoMasked "
    "DesignObservationalModel DesignPrimaryPurpose DesignTimePerspective StudyType",
    0.25: "ConditionAncestorTerm InterventionAncestorTerm CollaboratorName",
    0.15: "OtherOutcomeMeasure OutcomeMeasureTitle",
    0.1: "OtherOutcomeDescription OutcomeMeasureDescription LocationContactName",
}
_AREAS = {
    "BasicSearch": " ".join(_BASIC_SEARCH.values()),
    "ConditionSearch": """
        Condition BriefTitle OfficialTitle ConditionMeshTerm ConditionAncestorTerm Keyword NCTId""",
    "InterventionSearch": """
        InterventionName InterventionType ArmGroupType InterventionOtherName BriefTitle OfficialTitle ArmGroupLabel
        InterventionMeshTerm Keyword InterventionAncestorTerm InterventionDescription ArmGroupDescription""",
    "InterventionNameSearch": "InterventionName InterventionOtherName",
    "EligibilitySearch": "EligibilityCriteria StudyPopulation",
    "ExternalIdsSearch": "OrgStudyId SecondaryId",
    "OutcomeSearch": """
        PrimaryOutcomeMeasure SecondaryOutcomeMeasure PrimaryOutcomeDescription SecondaryOutcomeDescription
        OtherOutcomeMeasure OutcomeMeasureTitle OtherOutcomeDescription OutcomeMeasureDescription
        OutcomeMeasurePopulationDescription""",
    "OutcomeNameSearch": "PrimaryOutcomeMeasure SecondaryOutcomeMeasure OtherOutcomeMeasure OutcomeMeasureTitle",
    "TitleSearch": "Acronym BriefTitle OfficialTitle",
    "LocationSearch": "LocationCity LocationState LocationCountry LocationFacility LocationZip",
    "ContactSearch": "OverallOfficialName CentralContactName OverallOfficialAffiliation LocationContactName",
    "NCTIdSearch": "NCTId NCTIdAlias",
    "IdSearch": "NCTId NCTIdAlias Acronym OrgStudyId SecondaryId",
    "SponsorSearch": "LeadSponsorName CollaboratorName OrgFullName",
    "FunderTypeSearch": "LeadSponsorClass CollaboratorClass",
    "PatientSearch": """
        Acronym Condition BriefTitle OfficialTitle ConditionMeshTerm ConditionAncestorTerm BriefSummary Keyword
        InterventionName InterventionOtherName PrimaryOutcomeMeasure StdAge ArmGroupLabel SecondaryOutcomeMeasure
        InterventionDescription ArmGroupDescription PrimaryOutcomeDescription LeadSponsorName OrgStudyId SecondaryId
        NCTIdAlias SecondaryOutcomeDescription LocationFacility LocationState LocationCountry LocationCity
        BioSpecDescription ResponsiblePartyInvestigatorFullName ResponsiblePartyInvestigatorTitle
        ResponsiblePartyInvestigatorAffiliation ResponsiblePartyOldNameTitle ResponsiblePartyOldOrganization
        OverallOfficialAffiliation OverallOfficialName CentralContactName DesignInterventionModel DesignMasking
        DesignWhoMasked DesignObservationalModel DesignPrimaryPurpose DesignTimePerspective InterventionMeshTerm
        InterventionAncestorTerm CollaboratorName OtherOutcomeMeasure OtherOutcomeDescription LocationContactName""",
}
# Weight, in a ranking by relevance, of what BasicSearch does not search.
_OTHER_WEIGHT = 0.3


def _field_table() -> dict[str, Field]:
    table = {}
    kinds = ((Kind.TEXT, _TEXT), (Kind.ENUM, _ENUM), (Kind.DATE, _DATE), (Kind.NUMBER, _NUMBER), (Kind.AGE, _AGE))
    for kind, modules in kinds:
        for module, text in modules.items():
            for entry in text.split():
                name, _, below = entry.partition("=")
                values = tuple(_ENUM_VALUES.get(name, "").split())
                table[name] = Field(name, f"{module}.{below}".lstrip("."), kind, values)
    return table


FIELDS = _field_table()
TEXT_FIELDS = tuple(field for field in FIELDS.values() if field.is_text)
RANGE_FIELDS = tuple(field for field in FIELDS.values() if not field.is_text)
AREAS = {name: Area(name, tuple(FIELDS[field] for field in names.split())) for name, names in _AREAS.items()}
BASIC_SEARCH = AREAS["BasicSearch"]
_FIELD_AT = {field.path: field for field in FIELDS.values()}
_WEIGHTS = {field: weight for weight, names in _BASIC_SEARCH.items() for field in names.split()}
# In the order of TEXT_FIELDS.
RELEVANCE_WEIGHTS = tuple(_WEIGHTS.get(field.name, _OTHER_WEIGHT) for field in TEXT_FIELDS)


def field_of(name: str) -> Field | None:
    """The field with this piece name or path."""
    return FIELDS.get(name) or _FIELD_AT.get(name)


def area_of(name: str) -> Area | None:
    """The search area, or the area of the one field, with this name."""
    field = field_of(name)
    return AREAS.get(name) or (Area(name, (field,)) if field else None)
